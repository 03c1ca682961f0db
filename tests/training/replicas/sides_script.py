"""A script of several processes, with what makes an exact resume hard: see ``points_script``.

usage: sides_script.py [STEP:SIGNAL[:RANK],...] [--processes N] [--fault NAME] [--plain]
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
parser.add_argument("stop", nargs="?", default="-1:SIGKILL")
parser.add_argument("--processes", type=int, default=3)
parser.add_argument("--fault", default="")
arguments = parser.parse_args()
fault = arguments.fault


class Sides:
    """Points, and on which side of the origin they lie; each draws."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return point + 0.1 * torch.randn(6), (point[0] > 0).long()


several = {
    "distributed.strategy": "ddp" if fault != "fsdp" else "fsdp",
    "distributed.num_processes": arguments.processes,
}
if fault == "shards":
    several["distributed.num_shards"] = 4
run = holdfast.run(
    "sides",
    "one",
    store="store",
    seed=3,
    settings={
        "checkpoint.every_steps": 3,
        "checkpoint.is_auto": False,
        "ema.decays": [0.9],
        "logging.every_s": 0.0001,
        **several,
    },
)
batch_size = 12 if fault != "uneven" else 10
loader = run.loader(Sides(), batch_size=batch_size, drop_last=fault != "short", num_workers=0)
model: nn.Module = nn.Sequential(
    nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
draws = torch.Generator().manual_seed(1)
if fault != "alone":
    model = run.parallel(model)
run.keep(model=model, optimizer=optimizer, scheduler=scheduler, draws=draws)
run.values["best"] = float("inf")


@torch.no_grad()
def evaluate() -> float:
    """On crops of its own in each process: a step draws by rank."""
    model.eval()
    inputs = torch.randn(16, 6)
    loss = cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).item()
    model.train()
    return loss


stops = [stop.split(":") for stop in arguments.stop.split(",")]
for step in run.steps(30):
    optimizer.zero_grad(set_to_none=True)
    for _ in range(2):
        inputs, targets = next(loader)
        loss = cross_entropy(model(inputs + 0.01 * torch.randn(6, generator=draws)), targets) / 2
        loss.backward()
    if fault == "raises" and step == 7 and run.rank == 2:
        raise ValueError("the third process has had enough")
    if fault == "ends" and step == 7 and run.rank == 1:
        run.finish()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    run.log(loss=loss)
    if step % 5 == 4:
        measured = run.validated(loss=evaluate())
        run.values["best"] = min(run.values["best"], measured["loss"])
        if fault == "own value":
            run.values["mine"] = run.rank
    for number, name, *rank in stops:
        if step == int(number) and run.rank == int(rank[0] if rank else 0):
            os.kill(os.getpid() if rank else os.getppid(), signal.Signals[name])
if run.rank == 0:
    print("done", run.values["best"])
