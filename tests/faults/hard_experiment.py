"""An experiment as a user might write it, with everything that makes an exact resume hard.

Augmentation draws from three generators, the model has dropout and batch norm, the experiment has
state of its own, and one item in the data set is a Python object with a NumPy array.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from holdfast.training.configuration.schema import Section, Split
from holdfast.training.experiment.protocol import Batch, Context, Records

NUM_SAMPLES: dict[Split, int] = {"train": 331, "validation": 64, "test": 64}


class Spirals:
    """Points on three spirals: features fp32 [8], class."""

    def __init__(self, split: Split) -> None:
        generator = np.random.default_rng(len(split))
        num = NUM_SAMPLES[split]
        self._classes = generator.integers(0, 3, num)
        radius = generator.uniform(0.2, 1.0, num)
        angle = radius * 4 + self._classes * 2.1 + generator.normal(0, 0.15, num)
        self._points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
        self._is_train = split == "train"
        self.fingerprint = f"spirals-{split}"

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = self._points[index].copy()
        if self._is_train:
            point *= random.uniform(0.9, 1.1)
            point += np.random.normal(0, 0.02, 2)
        features = torch.tensor(np.concatenate([point, np.sin(3 * point), point**2, [1, 0]]))
        if self._is_train:
            features = features + 0.01 * torch.randn(8)
        return features.float(), torch.tensor(int(self._classes[index]))


class HardSettings(Section):
    """Settings of the experiment."""

    width: int = Field(48, ge=1)
    """Units of the hidden layers."""
    nan_at_call: int | None = None
    """The loss is NaN at this call."""
    pauses: tuple[int, ...] = ()
    """At these calls of the loss ``<call>.reached`` is made, and ``<call>.go`` waited for."""
    pause_folder: Path | None = None
    """Where."""


class Hard:
    """Classify points on spirals."""

    Settings = HardSettings
    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_size": 32},
        "train": {"num_epochs": 8, "num_microbatches": 3, "clip_norm": 1.0},
        "optimizer": {"name": "AdamW", "args": {"lr": 1e-2}},
        "scheduler": {
            "name": "ReduceLROnPlateau",
            "args": {"factor": 0.5, "patience": 1},
        },
        "warmup": {"num_epochs": 1, "num_steps": 3},
        "early_stopping": {"patience_epochs": 6},
        "ema": {"decays": [0.9, 0.99], "posthoc_gammas": [6.94]},
        "selection": {"metric": "accuracy", "mode": "max", "top_k": 3},
        "logging": {"every_s": 0.05},
    }

    def __init__(self, context: Context) -> None:
        self._settings: HardSettings = context.settings
        self._num_calls = 0
        self._loss_scale = 1.0

    def dataset(self, split: Split) -> Spirals:
        return Spirals(split)

    def model(self) -> nn.Module:
        width = self._settings.width
        return nn.Sequential(
            nn.Linear(8, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 3),
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        features, classes = batch
        loss = functional.cross_entropy(model(features), classes)
        self._num_calls += 1
        if self._num_calls in self._settings.pauses:
            self._pause()
        if self._num_calls == self._settings.nan_at_call:
            return loss * float("nan")
        # A loss normalizer that learns: state outside of model and optimizer.
        self._loss_scale = 0.99 * self._loss_scale + 0.01 * loss.item()
        noise = 1.0 + 0.001 * random.random() + 0.001 * float(np.random.rand())
        return loss * noise / max(self._loss_scale, 0.1)

    def _pause(self) -> None:
        assert self._settings.pause_folder is not None
        place = self._settings.pause_folder / str(self._num_calls)
        place.with_suffix(".reached").touch()
        deadline_s = time.monotonic() + 240  # so that a test that failed leaves no process behind
        while not place.with_suffix(".go").exists():
            assert time.monotonic() < deadline_s, f"nobody made {place}.go"
            time.sleep(0.01)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        features, classes = batch
        logits = model(features)
        return {
            "loss": functional.cross_entropy(logits, classes, reduction="none"),
            "is_correct": logits.argmax(1) == classes,
        }

    def metrics(self, records: Records) -> dict[str, float]:
        return {
            "loss": float(records["loss"].mean()),
            "accuracy": float(records["is_correct"].mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"num_calls": self._num_calls, "loss_scale": self._loss_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._num_calls = state["num_calls"]
        self._loss_scale = state["loss_scale"]


class Forgetful(Hard):
    """Without the state that it needs."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class HardInShards(Hard):
    """As hard, without state that depends on which samples a process has seen."""

    defaults: ClassVar[dict[str, Any]] = {
        **Hard.defaults,
        "data": {"batch_size": 48},
        "train": {"num_epochs": 3, "num_microbatches": 2, "clip_norm": 1.0},
        "distributed": {"strategy": "ddp"},
    }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        features, classes = batch
        noise = 1.0 + 0.001 * random.random() + 0.001 * float(np.random.rand())
        return functional.cross_entropy(model(features), classes) * noise

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class CountsCalls(HardInShards):
    """Keeps what differs from process to process."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self._num_calls += len(batch[0]) % 5
        return super().loss(model, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"num_calls": self._num_calls}


class OtherData(HardInShards):
    """Its data depend on the process."""

    def dataset(self, split: Split) -> Spirals:
        dataset = super().dataset(split)
        dataset.fingerprint += f"-{os.getpid()}"
        return dataset


class OtherSettings(HardInShards):
    """Its defaults depend on the process."""

    defaults: ClassVar[dict[str, Any]] = {
        **HardInShards.defaults,
        "experiment": {"width": 40 + os.getpid() % 97},
    }


class FailsOnOne(HardInShards):
    """Its loss fails in one process."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        self._num_calls += 1
        if rank == 2 and self._num_calls == 4:
            raise ValueError("this one sample")
        return super().loss(model, batch)
