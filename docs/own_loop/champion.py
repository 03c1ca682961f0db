"""A script that hands its champion over: on which side of a line points lie."""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import holdfast

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
config = parser.parse_args()
run = holdfast.run("sides", "first", seed=7, config=config)

draws = torch.Generator().manual_seed(0)
points = torch.randn(600, 6, generator=draws)
sides = (points[:, 0] + 0.3 * torch.randn(600, generator=draws) > 0).long()
parts = {"train": slice(0, 400), "validation": slice(400, 500), "test": slice(500, 600)}


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))


def evaluate(model, split):
    model.eval()
    with torch.no_grad():
        outputs, targets = model(points[parts[split]]), sides[parts[split]]
    right = (outputs.argmax(1) == targets).float()
    return {"loss": cross_entropy(outputs, targets, reduction="none"), "accuracy": right}


loader = run.loader(TensorDataset(points[parts["train"]], sides[parts["train"]]), batch_size=16)
model = make_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run.keep(model=model, optimizer=optimizer)

for step in run.steps(config.steps):
    model.train()
    inputs, targets = next(loader)
    loss = cross_entropy(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    if step % 25 == 24:
        run.validated(**{name: rows.mean() for name, rows in evaluate(model, "validation").items()})

run.champion(model=make_model, evaluate=evaluate, example_inputs=points[parts["validation"]])
