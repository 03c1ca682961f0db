"""Evaluates calls, before the loop, within a step and after it, and prints what each says.

usage: bad_calls_script.py STORE CALLS, a JSON list of [place, expression]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

import holdfast
from holdfast.training.errors import HoldfastError

STORE, CALLS = sys.argv[1], json.loads(sys.argv[2])
data = [torch.zeros(2)] * 4


class Stream(torch.utils.data.IterableDataset[int]):
    """Has no items by index."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def say(place: str) -> None:
    """Evaluate the calls of a place."""
    for wanted, expression in CALLS:
        if wanted == place:
            names = {"run": run, "data": data, "nn": nn, "np": np, "torch": torch, "Stream": Stream}
            try:
                exec(expression, {**names, "model": model, "holdfast": holdfast})
                told = "nothing"
            except HoldfastError as error:
                told = str(error)
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                told = f"{type(error).__name__}: {error}"
            print(json.dumps([expression, told]), flush=True)


model = nn.Linear(2, 1)
run = holdfast.run("calls", "one", store=STORE, settings={"ema.decays": [0.9]})
say("before")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, optimizer=optimizer)
for _step in run.steps(1):
    say("step")
    run.log(loss=1.0)
say("after")
