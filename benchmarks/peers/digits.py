"""What every rival trains: digits with dropout, batch norm and drawn augmentation.

A rival is a script beside this one, which takes these arguments and trains ``Digits`` for
``NUM_EPOCHS`` epochs. It may be stopped by a signal after some steps; started again, it goes on as
its trainer's documentation says. At its end it calls ``end`` with the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

NUM_EPOCHS, BATCH_SIZE, RATE, WEIGHT_DECAY = 3, 32, 3e-3, 1e-2
NUM_IMAGES = 800
NUM_STEPS = NUM_EPOCHS * NUM_IMAGES // BATCH_SIZE
SAVE_EVERY_STEPS = 10


@dataclass(frozen=True)
class Arguments:
    """How one process life goes."""

    seed: int
    workers: int


def begin() -> Arguments:
    """Parse the arguments; the process stops itself where it is asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--stop", default="", help="SIGNAL:STEPS after which it comes")
    parsed = parser.parse_args()
    if parsed.stop:
        name, _, steps = parsed.stop.partition(":")
        left = [int(steps)]

        def after_step(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.Signals[name])

        register_optimizer_step_post_hook(after_step)
    return Arguments(parsed.seed, parsed.workers)


class Images:
    """Training images fp32 [1, 8, 8], moved and made noisy by what torch draws, with classes."""

    def __init__(self) -> None:
        found = load_digits()
        self.images = torch.from_numpy(found.images[:NUM_IMAGES]).float()[:, None] / 16
        self.classes = torch.from_numpy(found.target[:NUM_IMAGES])

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shift = [int(s) for s in torch.randint(-1, 2, (2,))]
        moved = self.images[index].roll(shift, dims=(1, 2))
        return {"images": moved + 0.05 * torch.randn(1, 8, 8), "labels": self.classes[index]}


class Digits(nn.Module):
    """Images [B, 1, 8, 8] and classes [B] to loss and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.3), nn.Linear(16 * 16, 10)),
        )

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """As models of transformers do."""
        logits = self.layers(images)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def decayed(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LinearLR:
    """The schedule of all rivals: down to a tenth."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, NUM_STEPS)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all rivals."""
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)


def end(model: nn.Module) -> None:
    """Training is over: leave the digest of the weights."""
    Path("weights.txt").write_text(digest_of(model))


def digest_of(model: nn.Module) -> str:
    """Of names and bytes of parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_tensors(model)):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
