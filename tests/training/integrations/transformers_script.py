"""The points with Transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import IterableDataset
from trained_points import ACCUMULATED, NUM_EPOCHS, Points, arguments, fault, net, stop_after
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from holdfast.integrations.transformers import Trainer


class Ema(TrainerCallback):
    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.average = AveragedModel(named["model"], multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        self.average.update_parameters(named["model"])
        torch.rand(1)
        stop_after(state.global_step)


class KeptEma(Ema):
    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.load_state_dict(state)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        control.should_training_stop |= fault == "stops early" and state.global_step == 10
        control.should_epoch_stop |= fault == "epoch stop" and state.global_step == 3


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


callbacks = [Ema() if fault == "hidden" else KeptEma(), Stop(), EarlyStoppingCallback(50)]
trainer = Trainer(
    model=net,
    args=TrainingArguments(
        "trained",
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=ACCUMULATED,
        dataloader_num_workers=arguments.workers,
        learning_rate=0.01,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0},
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=3,
        logging_steps=2,
        save_strategy="steps" if fault == "best model" else "no",
        save_steps=3,
        max_steps=5 if fault == "stream" else -1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        load_best_model_at_end=fault == "best model",
        auto_find_batch_size=fault == "batch size",
        ignore_data_skip=fault == "data skip",
    ),
    train_dataset=Stream() if fault == "stream" else Points(),  # type: ignore[arg-type]
    eval_dataset=Points(noise=0.0),  # type: ignore[arg-type]
    callbacks=callbacks,
)
trainer.train(resume_from_checkpoint="trained" if fault == "resume" else None)
if fault == "twice":
    trainer.train()
metrics = [
    sorted((name, value) for name, value in entry.items() if not name.endswith(("time", "second")))
    for entry in trainer.state.log_history
]
print("done", trainer.state.global_step, metrics)
