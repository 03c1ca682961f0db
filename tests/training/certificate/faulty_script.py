"""A script with one hidden fault, or none: what a resume of it loses.

usage: faulty_script.py FAULT
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import holdfast

fault = sys.argv[1]
run = holdfast.run("faulty", "one", seed=5)
torch.manual_seed(1)
points = torch.randn(40, 4)
wanted = points.sum(1, keepdim=True)
pairs = list(zip(points, wanted, strict=True))
loader = run.loader(pairs, batch_size=4, num_workers=1 if fault == "clean workers" else 0)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 1))


class Counting(torch.optim.SGD):
    """Has an attribute of its own, which no ``state_dict`` of it knows."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.num_updates = 0

    def step(self, closure: Any = None) -> Any:
        """As SGD."""
        self.num_updates += 1
        return super().step(closure)


kind = Counting if fault == "optimizer" else torch.optim.Adam
optimizer = kind(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
average = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
)
scaler = torch.amp.GradScaler("cpu", enabled=False)
own_draws = np.random.default_rng(3)
names = itertools.cycle([1.0, 0.5, 2.0])
num_calls = 0
kept: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
kept |= {"average": average, "own_draws": own_draws, "scaler": scaler}
if fault in ("scheduler", "average", "own_draws"):
    del kept[fault]
run.keep(**kept)
run.values["num_calls"] = 0


class Weights:
    """Hashed by where they lie in memory."""

    def __init__(self, value: float) -> None:
        self.value = value


weights = {Weights(0.1 * number) for number in range(50)}
begun_s = time.time()
order = iter(DataLoader(pairs, batch_size=4, shuffle=True))  # type: ignore[arg-type]
fetched = next(order) if fault == "prefetched" else None
stream = iter([pair for _ in range(9) for pair in pairs])


@torch.library.custom_op("faulty::unsteady", mutates_args=())
def unsteady(inputs: Tensor) -> Tensor:
    """Another result each time, as an atomic addition on a GPU may have."""
    drawn = np.frombuffer(os.urandom(inputs.numel()), dtype=np.uint8).copy()
    return inputs + 1e-6 * torch.from_numpy(drawn).reshape(inputs.shape)


unsteady.register_autograd(lambda _, gradient: gradient)


def batches() -> Iterator[Any]:
    """Of a plain DataLoader, over and over."""
    while True:
        yield from DataLoader(pairs, batch_size=4, shuffle=True, num_workers=1)  # type: ignore[arg-type]


plain = batches()


def take() -> tuple[Tensor, Tensor]:
    """The next batch, or what a fault makes of it."""
    global fetched
    if fault == "prefetched":
        batch, fetched = fetched, next(order, None) or next(iter(DataLoader(pairs, batch_size=4)))  # type: ignore[arg-type]
        return batch
    if fault == "iterator":
        taken = [next(stream) for _ in range(4)]
        return torch.stack([x for x, _ in taken]), torch.stack([y for _, y in taken])
    if fault == "plain loader":
        return next(plain)
    return next(loader)


def factor() -> float:
    """One, and what a fault adds."""
    global num_calls
    if fault in ("own_draws", "clean draws"):
        return 1 + float(own_draws.random())
    if fault == "counter":
        num_calls += 1
        return 1 / num_calls
    if fault == "clean counter":
        run.values["num_calls"] += 1
        return 1 / float(run.values["num_calls"])
    if fault == "set order":
        return sum(place * weight.value for place, weight in enumerate(weights))
    if fault == "time":
        return 1 + (time.time() - begun_s)
    return 1 / (1 + optimizer.num_updates) if fault == "optimizer" else 1.0


for _step in run.steps(30):
    inputs, targets = take()
    outputs = model(inputs)
    if fault == "operator":
        outputs = unsteady(outputs)
    loss = mse_loss(outputs, targets) * factor()
    if fault in ("average", "clean average"):
        loss = loss + 0.1 * mse_loss(outputs, average(inputs).detach())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    scheduler.step()
    average.update_parameters(model)
    run.log(loss=loss)
