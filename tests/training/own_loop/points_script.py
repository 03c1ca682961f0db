"""A training script as people have them, with what makes an exact resume hard.

Augmentation draws from torch, the model has dropout and batch norm, a scheduler takes a function,
noise comes from generators of the script's own, and a plain number is kept.

usage: points_script.py FORM STORE [STEP:SIGNAL,...] [--workers N] [--fault NAME]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("form", choices=["steps", "epochs", "accumulated"])
parser.add_argument("store")
parser.add_argument("stop", nargs="?", default="-1:SIGKILL")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--fault", default="")
parser.add_argument("--rate", type=float, default=0.01)
arguments = parser.parse_args()
fault = arguments.fault


class Points:
    """Points around the origin, and on which side of it they lie."""

    def __init__(self) -> None:
        self.noise = 0.1

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return point + 0.1 * torch.randn(6), (point[0] > 0).long()


class Average:
    """An average of the weights that the script keeps by itself."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: t.clone() for name, t in model.state_dict().items()}

    def update(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors} if fault != "unkeepable" else {"tensors": {1, 2}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors = state["tensors"]


if fault == "thread":

    def begin() -> None:
        holdfast.run("points", "one", store=arguments.store)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    print("the thread's error went by")

run = holdfast.run(
    "points",
    "one" if fault != "name" else "../one",
    store=arguments.store,
    seed=3,
    config={"rate": arguments.rate} if fault != "config" else {"rate": object()},
    settings={
        "checkpoint.every_steps": 3,
        "checkpoint.is_auto": False,
        "ema.decays": [0.9],
        "logging.every_s": 0.0001,
        **({"optimizer.name": "Adam"} if fault == "own setting" else {}),
        **({"checkpoint.weights_every_steps": 3} if fault == "validating" else {}),
        **({"checkpoints.every_steps": 3} if fault == "unknown setting" else {}),
    },
)
loader = run.loader(Points(), batch_size=8, num_workers=arguments.workers)
model = nn.Sequential(
    nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2)
)
head = nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate)
if fault == "resized buffer":
    head.register_buffer("codes", torch.ones(1))
head_optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
average = Average(model)
numpy_draws, draws = np.random.default_rng(1), torch.Generator().manual_seed(1)
python_draws = random.Random(2)
kept = {"model": model, "head": head, "optimizer": optimizer, "head_optimizer": head_optimizer}
kept |= {"scheduler": scheduler, "average": average, "numpy_draws": numpy_draws, "draws": draws}
if fault == "parallel":
    kept["model"] = nn.DataParallel(model)
elif fault == "stateless":
    kept["loader"] = object()
elif fault == "inner parallel":
    kept["model"] = nn.Sequential(nn.DataParallel(model))
elif fault == "sharded":
    kept["model"] = type("FSDPModule", (nn.Module,), {})()
elif fault == "engine":
    kept["model"] = type("DeepSpeedEngine", (nn.Module,), {})()
elif fault == "fully sharded":
    kept["model"] = type("FullyShardedDataParallel", (nn.Module,), {})()
elif fault == "zero":
    kept["optimizer"] = type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {})(model.parameters())
elif fault == "twice":
    kept["again"] = model
elif fault == "absent":
    kept["scaler"] = None  # type: ignore[assignment]
elif fault == "class":
    kept["model"] = nn.Linear  # type: ignore[assignment]
elif fault == "no dict":
    odd = {"state_dict": lambda _: 3, "load_state_dict": lambda *_: None}
    kept["average"] = type("Odd", (), odd)()
elif fault == "data loader":
    kept["loader"] = torch.utils.data.DataLoader(Points())  # type: ignore[arg-type]
elif fault == "no model":
    kept = {"optimizer": optimizer}
elif fault == "nothing":
    kept = {}
elif fault == "process group":  # which has an excepthook of its own
    address = f"file://{Path.cwd()}/group"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    kept["model"] = nn.parallel.DistributedDataParallel(model)
elif fault == "two runs":
    holdfast.run("points", "two", store=arguments.store)
elif fault == "batch outside":
    next(loader)
run.keep(**kept, python_draws=python_draws)
run.values["best"] = float("inf") if fault != "value" else {1, 2}
STOP_STEP, _, STOP_SIGNAL = arguments.stop.partition(":")


def update(batch: tuple[Tensor, Tensor], weight: float = 1.0) -> Tensor:
    """Forward and backward of a part of a step."""
    points, sides = batch
    noise = numpy_draws.random() + python_draws.random()
    noise += torch.rand((), generator=draws).item()
    loss = cross_entropy(head(model(points)), sides) * float(1 + 0.01 * noise) * weight
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def step_with(loss: Tensor) -> None:
    """The rest of a step."""
    for each in (optimizer, head_optimizer):
        each.step()
        each.zero_grad()
    scheduler.step()
    average.update(model)
    run.log(loss=loss, rate=scheduler.get_last_lr()[0])
    if run.step == int(STOP_STEP) and fault != "last loss":
        if fault == "raises":
            raise ValueError("the fan has stopped")
        if fault == "fork" and os.fork() == 0:
            sys.exit()
        os.kill(os.getpid(), signal.Signals[STOP_SIGNAL])


def validate() -> None:
    """What selection may look at."""
    model.eval()
    with torch.no_grad(), run.averaged(0.9):
        points, sides = next(iter(torch.utils.data.DataLoader(Points(), 64)))  # type: ignore[arg-type]
        loss = cross_entropy(head(model(points)), sides)
    model.train()
    run.values["best"] = min(run.values["best"], loss.item())
    run.validated(loss=loss)


if fault == "no step":
    sys.exit()
if fault in {"forked loop", "process's loop"}:
    multiprocessing.set_start_method("fork")

    def loop() -> None:
        """What belongs into the process that called holdfast.run."""
        for _ in run.steps(40):
            run.log(loss=1.0)

    if fault == "process's loop":
        child = multiprocessing.Process(target=loop)
        child.start()
        child.join()
        print("child", child.exitcode)
    elif (pid := os.fork()) == 0:
        loop()
        sys.exit()
    else:
        print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
if fault == "thread's loop":
    thread = threading.Thread(target=lambda: next(run.steps(40)))
    thread.start()
    thread.join()

if fault in {"plain loop", "plain epochs"}:  # what people have before they know run.steps
    for _epoch in range(2) if fault == "plain loop" else run.epochs(2):
        for batch in torch.utils.data.DataLoader(Points(), 8):  # type: ignore[arg-type]
            update(batch)
            optimizer.step()
    sys.exit()
if arguments.form == "steps":
    for step in run.steps(40):
        step_with(update(next(loader)))
        if fault == "loss of each":
            run.log(loss=torch.ones(3))
        if fault == "metric of each":
            run.validated(loss=torch.ones(3))
        if fault == "late value":
            run.values["best"] = {1, 2}
        if fault == "late keep":
            run.keep(late=head)
        if fault == "new group" and step == 10:
            head_optimizer.add_param_group({"params": model.parameters()})
        if fault == "new buffer" and step == 10:
            head.register_buffer("usage", torch.ones(2))
        if fault == "resized buffer":
            head.codes = torch.cat([head.codes, torch.ones(1)])
        if fault == "ends early" and step == 10:
            break
        if fault == "leaves with 3" and step == 5:
            sys.exit(3)
        if fault == "wrong name":
            run.log(loss=lossy)  # type: ignore[name-defined]  # noqa: F821
        if fault == "finishes early" and step == 10:
            run.finish()
            break
        if step % 10 == 9:
            validate()
elif arguments.form == "epochs":
    if fault == "asked rate":
        run.restore()
        head_optimizer.param_groups[0]["lr"] = arguments.rate
    for _epoch in run.epochs(5):
        if fault == "curriculum":
            loader.dataset.noise = 0.1 * _epoch
        if fault == "tops":  # of an epoch, which a resume within it does again
            head_optimizer.param_groups[0]["lr"] *= 0.8
            run.values["sum"] = torch.rand(()).item()
        for batch in loader:
            loss = update(batch)
            step_with(loss)
            if fault == "left epoch" and run.step == 3:
                break
            if fault == "left last epoch" and run.step == 35:
                break
            if fault == "tops":
                run.values["sum"] += loss.item()
        if fault == "last loss":  # of the loop's variables, as after any loop
            assert loss.item() > 0
            if run.step == int(STOP_STEP):
                time.sleep(1)  # a save in flight lands
                os.kill(os.getpid(), signal.SIGKILL)
        if fault == "tops":
            run.values["best"] = run.values["sum"]
        else:
            validate()
    if fault == "asked rate":
        assert head_optimizer.param_groups[0]["lr"] == arguments.rate
else:
    for _epoch in run.epochs(5):
        for _step in run.steps(4):
            step_with(update(next(loader), 0.5) + update(next(loader), 0.5))
        validate()
print("done", run.step, run.values["best"])
