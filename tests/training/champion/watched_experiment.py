"""``Hard``, telling which data it is asked for and what it scores; it can end its own process."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from holdfast.training.configuration.schema import Split
from holdfast.training.experiment.protocol import Batch, Context, Records
from tests.faults.hard_experiment import Hard, Spirals

LOG = "HOLDFAST_TEST_LOG"
"""A file: one line per call, ``<process> <call>``."""
DEED = "HOLDFAST_TEST_DEED"
"""``<signal> <call> <count>``: the process sends itself the signal in that call."""


class Watched(Hard):
    """Its scores have noise: each batch draws from three generators."""

    defaults: ClassVar[dict[str, Any]] = {
        **Hard.defaults,
        "data": {"batch_size": 32, "evaluation_batch_size": 8},
        "train": {"num_epochs": 4},
        "selection": {**Hard.defaults["selection"], "num_bootstrap": 200, "save_every_s": 0},
    }

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._counts: Counter[str] = Counter()

    def dataset(self, split: Split) -> Spirals:
        self._tell(f"dataset-{split}")
        return super().dataset(split)

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        self._tell("score")
        scored = super().score(model, batch)
        noise = 1e-3 * (torch.rand(len(scored["loss"])) + float(np.random.rand()))
        return {**scored, "loss": scored["loss"] + noise}

    def metrics(self, records: Records) -> dict[str, float]:
        self._tell("metrics")
        return super().metrics(records)

    def _tell(self, call: str) -> None:
        log = os.environ.get(LOG)
        if log:
            with Path(log).open("a") as file:
                file.write(f"{os.getpid()} {call}\n")
        self._counts[call] += 1
        deed = os.environ.get(DEED, "none none 0").split()
        if deed[1:] == [call, str(self._counts[call])]:
            os.kill(os.getpid(), signal.Signals[deed[0]])
