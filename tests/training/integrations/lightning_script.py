"""The points with Lightning's Trainer."""

from __future__ import annotations

import os
import signal
from typing import Any

import lightning.pytorch as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, Timer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, WeightedRandomSampler
from trained_points import (
    ACCUMULATED,
    NUM_EPOCHS,
    NUM_POINTS,
    Points,
    arguments,
    fault,
    net,
    stop_after,
)

from holdfast.integrations.lightning import Exact

told: list[Any] = []


class Stop(Callback):
    def on_sanity_check_start(self, *_: Any) -> None:
        if fault == "early notice":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        torch.rand(1)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        stop_after(trainer.global_step)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        torch.rand(trainer.current_epoch + 1)


class Hidden(Callback):
    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.average = AveragedModel(module.net)


class Batches:
    def __iter__(self) -> Any:
        return iter([{"x": torch.zeros(2, 6), "labels": torch.zeros(2).long()}])


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net
        self.accuracy = torchmetrics.MeanMetric()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        found = self.net(**batch)
        self.accuracy.update((found["logits"].argmax(1) == batch["labels"]).float())
        self.log("train_loss", found["loss"], on_step=False, on_epoch=True)
        self.log("train_accuracy", self.accuracy, on_step=False, on_epoch=True)
        return found["loss"]  # type: ignore[no-any-return]

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(**batch)["loss"])

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        told.append([self.current_epoch, *(metrics[n].item() for n in sorted(metrics))])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["told"] = list(told)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        told[:] = checkpoint["told"]

    def train_dataloader(self) -> Any:
        if fault == "no loader":
            return Batches()
        sampler = WeightedRandomSampler([1.0 + i % 3 for i in range(NUM_POINTS)], NUM_POINTS)
        loader = DataLoader(Points(), 8, sampler=sampler, num_workers=arguments.workers)  # type: ignore[arg-type]
        return [loader, loader] if fault == "two loaders" else loader

    def val_dataloader(self) -> Any:
        return DataLoader(Points(), 32)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"},
        }


callbacks = [Exact(), EMAWeightAveraging(decay=0.9), EarlyStopping("val_loss", patience=50)]
callbacks += [Hidden()] if fault == "hidden" else [Timer()] if fault == "clock" else []
trainer = pl.Trainer(
    max_epochs=2 if fault == "stops early" else NUM_EPOCHS,
    accumulate_grad_batches=ACCUMULATED,
    val_check_interval=0.5,
    callbacks=[*callbacks, Stop()],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accelerator="cpu",
)
trainer.fit(Module(), ckpt_path="out.ckpt" if fault == "resume" else None)
print("done", trainer.global_step, told)
