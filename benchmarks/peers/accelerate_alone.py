"""Accelerate: ``save_state`` now and then and at SIGTERM, ``load_state`` and skipped batches."""

import signal
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from digits import (
    BATCH_SIZE,
    NUM_EPOCHS,
    SAVE_EVERY_STEPS,
    Digits,
    Images,
    begin,
    decayed,
    end,
    optimizer_of,
)
from torch.utils.data import DataLoader

notices: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: notices.append(number))
arguments = begin()
set_seed(arguments.seed)
accelerator = Accelerator(
    cpu=True,
    project_config=ProjectConfiguration("out", automatic_checkpoint_naming=True, total_limit=2),
    dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
)
model = Digits()
optimizer = optimizer_of(model)
loader = DataLoader(Images(), BATCH_SIZE, shuffle=True, num_workers=arguments.workers)
model, optimizer, loader, scheduler = accelerator.prepare(
    model, optimizer, loader, decayed(optimizer)
)
place = Path("out", "place.txt")
step = 0
if Path("out", "checkpoints").exists():
    accelerator.load_state()
    step = int(place.read_text())
    accelerator.project_configuration.iteration = 1 + max(
        int(folder.name.rpartition("_")[2]) for folder in Path("out", "checkpoints").iterdir()
    )


def save() -> None:
    """The state, and how many steps are done."""
    place.parent.mkdir(exist_ok=True)
    accelerator.save_state()
    place.write_text(str(step))


for epoch in range(step // len(loader), NUM_EPOCHS):
    loader.set_epoch(epoch)
    left = accelerator.skip_first_batches(loader, step % len(loader))
    for batch in left:
        optimizer.zero_grad()
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        scheduler.step()
        step += 1
        if notices:
            save()
            raise SystemExit(143)
        if step % SAVE_EVERY_STEPS == 0:
            save()
end(model)
