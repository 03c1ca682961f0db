"""A training script that hands its champion over.

usage: champion_script.py [--fault NAME] [--returns records|numbers|number] [--steps N] [--pause S]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("--fault", default="")
parser.add_argument("--returns", default="records")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--pause", type=float, default=0.0)
arguments = parser.parse_args()
fault = arguments.fault

run = holdfast.run(
    "sides",
    "first",
    store="store",
    seed=3,
    config={"steps": arguments.steps},
    settings={
        "checkpoint.every_steps": 5,
        "checkpoint.is_auto": False,
        "ema.decays": [0.9],
        "export.formats": ["weights", "onnx"],
        "export.num_latency_runs": 10,
        "logging.every_s": 0.0001,
    },
)
draws = torch.Generator().manual_seed(0)
points = torch.randn(300, 6, generator=draws)
sides = (points[:, 0] + 0.3 * torch.randn(300, generator=draws) > 0).long()
SPLITS = {"validation": slice(200, 250), "test": slice(250, 300)}


def make_model(width: int = 16) -> nn.Module:
    """The model of this script."""
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 2))


def records(model: nn.Module, split: str) -> dict[str, Tensor]:
    """One row for each sample."""
    model.eval()
    with torch.no_grad():
        outputs = model(points[SPLITS[split]])
    targets = sides[SPLITS[split]]
    loss = cross_entropy(outputs, targets, reduction="none")
    return {"loss": loss, "accuracy": (outputs.argmax(1) == targets).float()}


def evaluate(model: nn.Module, split: str) -> Any:
    """What the champion is chosen by."""
    assert next(model.parameters()).device == torch.device("cpu")
    if fault == "text":
        return {"loss": "small"}
    if fault == "nothing":
        return None
    if fault == "ragged":
        return {"loss": torch.ones(3), "accuracy": torch.ones(4)}
    if fault == "other metric":
        return {"accuracy": 0.5}
    found = records(model, split)
    return found if arguments.returns == "records" else {k: v.mean() for k, v in found.items()}


def evaluate_validation(model: nn.Module) -> float:
    """As many scripts have it."""
    return records(model, "validation")["loss"].mean().item()


loader = run.loader(TensorDataset(points[:200], sides[:200]), batch_size=16)  # type: ignore[arg-type]
model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
kept: dict[str, Any] = {"model": model, "optimizer": optimizer}
if fault == "several":
    kept["head"] = nn.Linear(2, 2)
run.keep(**kept)
handed: dict[str, Any] = {
    "model": make_model,
    "evaluate": evaluate if arguments.returns != "number" else evaluate_validation,
    "example_inputs": points[:16],
}
if fault == "early":
    run.champion(**handed)
for step in run.steps(arguments.steps):
    if fault == "within":
        run.champion(**handed)
    model.train()
    inputs, targets = next(loader)
    loss = cross_entropy(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    run.log(loss=loss)
    time.sleep(arguments.pause)
    if step % 10 == 9:
        run.validated(**{k: v.mean() for k, v in records(model, "validation").items()})
print('{"event": "outcome", "of": "the script, and none of ours"}')
if fault == "leaves":
    raise SystemExit(0)
changes: dict[str, dict[str, Any]] = {
    "no examples": {"example_inputs": None},
    "no model": {"model": None},
    "no module": {"model": lambda: 3},
    "another model": {"model": lambda: make_model(8)},
    "no evaluation": {"evaluate": 3},
    "instance": {"model": model},
}
run.champion(**{**handed, **changes.get(fault, {})})
