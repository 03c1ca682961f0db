"""Transformers' Trainer with ``holdfast.integrations.transformers``."""

from digits import BATCH_SIZE, NUM_EPOCHS, Digits, Images, begin, decayed, end, optimizer_of
from transformers import TrainingArguments

import holdfast
from holdfast.integrations.transformers import Trainer

arguments = begin()
holdfast.run("peers", "transformers", seed=arguments.seed, settings={"checkpoint.every_steps": 10})
model = Digits()
optimizer = optimizer_of(model)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "out",
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        dataloader_num_workers=arguments.workers,
        save_strategy="no",
        seed=arguments.seed,
        max_grad_norm=0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=Images(),
    optimizers=(optimizer, decayed(optimizer)),
)
trainer.train()
end(model)
