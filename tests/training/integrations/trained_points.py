"""What two scripts with somebody else's trainer train: what makes an exact resume hard.

Items draw their augmentation, the model has dropout and batch norm; in the scripts gradients are
accumulated, a callback averages weights, and a scheduler looks at what was logged.

usage: SCRIPT.py STORE [STEP:SIGNAL] [--workers N] [--fault NAME]
"""

from __future__ import annotations

import argparse
import os
import signal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("store")
parser.add_argument("stop", nargs="?", default="-1:SIGKILL")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--fault", default="")
arguments = parser.parse_args()
fault = arguments.fault
STOP_STEP, _, STOP_SIGNAL = arguments.stop.partition(":")
NUM_POINTS, NUM_EPOCHS, ACCUMULATED = 60, 4, 2  # 8 batches and 4 updates an epoch, the last short


class Points:
    """Points around the origin, and on which side of it they lie."""

    def __init__(self, noise: float = 0.1) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return NUM_POINTS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        point = torch.randn(6, generator=torch.Generator().manual_seed(index))
        drawn = torch.randn(6) if self.noise else torch.zeros(6)
        return {"x": point + self.noise * drawn, "labels": (point[0] > 0).long()}


class Net(nn.Module):
    """Returns the loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
        )

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def stop_after(step: int) -> None:
    if step == int(STOP_STEP):
        if fault == "raises":
            raise ValueError("the fan has stopped")
        os.kill(os.getpid(), signal.Signals[STOP_SIGNAL])


if fault != "no run":
    run = holdfast.run(
        "points",
        "one",
        store=arguments.store,
        seed=3,
        settings={
            "checkpoint.every_steps": 3,
            "checkpoint.is_auto": False,
            "logging.every_s": 0.0001,
        },
    )
net = Net()
