"""The model, text and vocabulary of the experiment language_model, with a loop of one's own."""

import argparse
import math
from pathlib import Path

import torch
from torch import nn

import holdfast
from holdfast.training.experiments.language_model.experiment import (
    LanguageModel,
    LanguageModelSettings,
)

parser = argparse.ArgumentParser()
parser.add_argument("--data", help="a folder of text; without it, a generated one")
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--warmup", type=int, default=20)
parser.add_argument("--rate", type=float, default=3e-3)
parser.add_argument("--context", type=int, default=32)
parser.add_argument("--batch", type=int, default=32)
config = parser.parse_args()
run = holdfast.run("own_language_model", "first", seed=1337, config=config)

settings = LanguageModelSettings(context=config.context)
task = LanguageModel(holdfast.Context(settings, config.data and Path(config.data)))
model = task.model()
optimizer = torch.optim.AdamW(task.parameter_groups(model), lr=config.rate, betas=(0.9, 0.99))


def factor(step):
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    part = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * part))


def evaluate(model, split):
    windows = task.dataset(split)
    (tokens, following), _ = windows.fetch(range(len(windows)))
    model.eval()
    with torch.no_grad():
        return {"loss": model(tokens, following).mean(1)}


scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
loader = run.loader(task.dataset("train"), batch_size=config.batch)
run.keep(model=model, optimizer=optimizer, scheduler=scheduler)

for step in run.steps(config.steps):
    model.train()
    loss = task.loss(model, next(loader))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    run.log(loss=loss)
    if step % 50 == 49:
        run.validated(loss=evaluate(model, "validation")["loss"].mean())

inputs, _ = task.dataset("validation").fetch(range(8))
run.champion(model=task.model, evaluate=evaluate, example_inputs=inputs)
