"""A language model's whole training beside nanoGPT's loop with the same model: losses and time.

The plain loop does what nanoGPT's train.py does with the settings of its README for a CPU: windows
that are drawn with replacement, the same groups, rates and clipping, and every 250 steps an
estimate of the loss on 20 batches of training data and 20 of validation data. Holdfast's run is a
segment as everybody starts it, with its validations and checkpoints. The two take turns, 50 steps
each, in one process. Both are then measured on the last tenth of the text, whole, and by nanoGPT's
estimate.

    python benchmarks/beside_nanogpt.py --config docs/language_model_shakespeare.toml \\
        --set data.folder=DATA/tinyshakespeare [--seeds N]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from interleaving import markdown_table
from torch import Tensor, nn

from holdfast.training.loop.segment import Together, run_segment
from holdfast.training.loop.trainer import Saving, Trainer
from holdfast.training.preemption.notices import Notice
from holdfast.training.runs.directory import read_segments
from holdfast.training.stage import Stage, StageArguments, prepared_stage

BATCH_SIZE, NUM_WARMUP, RATE, LOWEST_RATE = 12, 100, 1e-3, 1e-4
TURN_STEPS, EVALUATED_EVERY, NUM_ESTIMATED = 50, 250, 20
Tokens = tuple[Tensor, Tensor]


class PlainLoop:
    """What one would write by hand, as nanoGPT does."""

    def __init__(self, experiment: Any, context: int, num_steps: int, seed: int) -> None:
        self.experiment, self.context, self.num_steps = experiment, context, num_steps
        self.draws = torch.Generator().manual_seed(seed)
        self.windows = experiment.dataset("train")
        self.held_out = held_out(experiment, context)
        self.model = experiment.model().train()
        groups = experiment.parameter_groups(self.model)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99))
        self.step, self.training_s, self.evaluating_s = 0, 0.0, 0.0

    def advance(self) -> None:
        """Its next turn."""
        for _ in range(TURN_STEPS):
            if self.step == self.num_steps:
                return
            start_s = time.perf_counter()
            self._train()
            self.training_s += time.perf_counter() - start_s
            if self.step % EVALUATED_EVERY == 0:
                start_s = time.perf_counter()
                with torch.no_grad():
                    for _ in range(NUM_ESTIMATED):
                        self.experiment.loss(self.model.eval(), self._batch())
                estimate(self.model, self.held_out, self.context, self.draws)
                self.model.train()
                self.evaluating_s += time.perf_counter() - start_s

    def _train(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.num_steps)
        loss = self.experiment.loss(self.model, self._batch())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _batch(self) -> Any:
        starts = torch.randint(len(self.windows), (BATCH_SIZE,), generator=self.draws)
        return self.windows.fetch(starts.tolist())


def rate(step: int, num_steps: int) -> float:
    """nanoGPT's: a warm-up, then a cosine down to a tenth."""
    if step < NUM_WARMUP:
        return RATE * (step + 1) / (NUM_WARMUP + 1)
    part = (step - NUM_WARMUP) / (num_steps - NUM_WARMUP)
    return LOWEST_RATE + 0.5 * (1 + math.cos(math.pi * part)) * (RATE - LOWEST_RATE)


def held_out(experiment: Any, context: int) -> Tensor:
    """The last tenth of the text, which validates and tests here, and validates in nanoGPT."""
    parts = []
    for split in ("validation", "test"):
        windows = experiment.dataset(split)
        (tokens, _), _ = windows.fetch(range(len(windows)))
        parts.append(tokens.flatten())
    tokens = torch.cat(parts)
    return tokens[: len(tokens) // context * context]


@torch.no_grad()
def estimate(model: nn.Module, tokens: Tensor, context: int, draws: torch.Generator) -> float:
    """The loss on batches of windows at random places."""
    model.eval()
    losses = []
    for _ in range(NUM_ESTIMATED):
        starts = torch.randint(len(tokens) - context, (BATCH_SIZE, 1), generator=draws)
        rows = tokens[starts + torch.arange(context + 1)]
        losses.append(float(model(rows[:, :-1], rows[:, 1:]).mean()))
    return fmean(losses)


@torch.no_grad()
def whole(model: nn.Module, tokens: Tensor, context: int) -> float:
    """The loss of every token, in windows side by side."""
    model.eval()
    rows = tokens[: (len(tokens) - 1) // context * context].view(-1, context)
    following = tokens[1 : rows.numel() + 1].view(-1, context)
    costs = [model(*batch) for batch in zip(rows.split(64), following.split(64), strict=True)]
    return float(torch.cat(costs).mean())


@dataclass
class Turns:
    """The saver of a segment, after whose steps the plain loop has its turn."""

    saver: Saving
    plain: PlainLoop
    plain_s: float = field(default=0.0, init=False)
    num_steps: int = field(default=0, init=False)

    def is_light_due(self) -> bool:
        """The saver's."""
        return self.saver.is_light_due()

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """The saver's, then a turn."""
        self.saver.after_step(measured)
        self._turn()

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """The saver's, then a turn."""
        self.saver.after_epoch(metrics, is_last=is_last)
        self._turn()

    def finish(self) -> None:
        """The saver's."""
        self.saver.finish()

    def stop(self, notice: Notice) -> None:
        """The saver's."""
        self.saver.stop(notice)

    def _turn(self) -> None:
        self.num_steps += 1
        if self.num_steps % TURN_STEPS == 0:
            start_s = time.perf_counter()
            self.plain.advance()
            self.plain_s += time.perf_counter() - start_s


def trained(stage: Stage, seed: int) -> list[dict[str, float]]:
    """Train both; what came of the plain loop, and what of Holdfast's."""
    context, num_steps = stage.experiment.dataset("train")[0][0][0].numel(), total(stage)
    plain = PlainLoop(stage.experiment, context, num_steps, seed)
    turns: list[Turns] = []
    models: list[nn.Module] = []

    def saving(trainer: Trainer, saver: Saving) -> Saving:
        turns.append(Turns(saver, plain))
        models.append(trainer.state.model)
        return turns[0]

    start_s = time.perf_counter()
    run_segment(stage, Together(saving=saving))
    whole_s = time.perf_counter() - start_s - turns[0].plain_s
    costs_s = read_segments(stage.run)[-1].costs_s
    measured = []
    for model, training_s, all_s in (
        (plain.model, plain.training_s, plain.training_s + plain.evaluating_s),
        (models[0], costs_s["useful"] - turns[0].plain_s, whole_s),
    ):
        draws = torch.Generator().manual_seed(0)  # the same windows for both
        measured.append(
            {
                "whole": whole(model, plain.held_out, context),
                "estimated": estimate(model, plain.held_out, context, draws),
                "training_s": training_s,
                "all_s": all_s,
            }
        )
    return measured


def total(stage: Stage) -> int:
    """The steps of the run."""
    train = stage.config.train
    assert train.steps_per_epoch is not None
    return train.num_epochs * train.steps_per_epoch


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    loops: tuple[list[dict[str, float]], list[dict[str, float]]] = ([], [])
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as store:
            stage_arguments = StageArguments(
                experiment="language_model",
                store=Path(store),
                run_id="beside",
                num_threads=1,
                config_file=arguments.config,
                overrides=(*arguments.overrides, f"seed={seed}"),
                progress_format="none",
            )
            with prepared_stage(stage_arguments) as stage:
                for loop, found in zip(loops, trained(stage, seed), strict=True):
                    loop.append(found)
    rows = []
    for name, loop in zip(("plain loop", "holdfast, last weights"), loops, strict=True):
        columns = [[found[key] for found in loop] for key in ("whole", "estimated")]
        times = [[found[key] for found in loop] for key in ("training_s", "all_s")]
        rows.append(
            [name, *(spread(c, ".4f") for c in columns), *(spread(t, ".0f") for t in times)]
        )
    ratios = [
        f"{fmean(p[key] / h[key] for p, h in zip(*loops, strict=True)):.3f}"
        for key in ("training_s", "all_s")
    ]
    rows.append(["plain loop's time / holdfast's", "", "", *ratios])
    header = [f"n = {arguments.seeds}", "loss, whole", "loss, estimated", "steps, s", "all, s"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
