"""Transformers' Trainer with its own checkpoints, and one that a callback asks for at SIGTERM.

Its own ``enable_jit_checkpoint`` waits three seconds before it saves, and these trainings are over
by then.
"""

import signal
from typing import Any

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
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

notices: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: notices.append(number))


class Notice(TrainerCallback):
    """Saves and stops at the end of a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a notice."""
        del args, state
        control.should_save |= bool(notices)
        control.should_training_stop |= bool(notices)


arguments = begin()
set_seed(arguments.seed)
model = Digits()
optimizer = optimizer_of(model)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "out",
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        dataloader_num_workers=arguments.workers,
        save_strategy="steps",
        save_steps=SAVE_EVERY_STEPS,
        save_total_limit=2,
        seed=arguments.seed,
        max_grad_norm=0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=Images(),
    optimizers=(optimizer, decayed(optimizer)),
    callbacks=[Notice()],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint("out"))
if notices:
    raise SystemExit(143)
end(model)
