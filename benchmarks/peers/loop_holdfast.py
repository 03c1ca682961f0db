"""A plain loop with ``holdfast.run``."""

from digits import BATCH_SIZE, NUM_EPOCHS, Digits, Images, begin, decayed, end, optimizer_of

import holdfast

arguments = begin()
run = holdfast.run("peers", "loop", seed=arguments.seed, settings={"checkpoint.every_steps": 10})
model = Digits()
optimizer = optimizer_of(model)
scheduler = decayed(optimizer)
loader = run.loader(Images(), BATCH_SIZE, num_workers=arguments.workers)
run.keep(model=model, optimizer=optimizer, scheduler=scheduler)
for _epoch in run.epochs(NUM_EPOCHS):
    for batch in loader:
        optimizer.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.log(loss=loss)
end(model)
