"""The module that both scripts with Lightning train."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from digits import BATCH_SIZE, Digits, Images, decayed, optimizer_of
from torch import Tensor
from torch.utils.data import DataLoader


class DigitsModule(pl.LightningModule):
    """``Digits`` with its loader, optimizer and schedule."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.model = Digits()
        self.workers = workers

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss."""
        return self.model(**batch)["loss"]

    def train_dataloader(self) -> Any:
        """Shuffled batches."""
        return DataLoader(Images(), BATCH_SIZE, shuffle=True, num_workers=self.workers)

    def configure_optimizers(self) -> Any:
        """The schedule moves at each step."""
        optimizer = optimizer_of(self)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": decayed(optimizer), "interval": "step"},
        }
