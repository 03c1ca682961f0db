"""What the page tells of a script's own loop in the place of an experiment's stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.training.own_loop.opening import OWN, OWN_KEYS
from holdfast.training.reporting.facts import Epoch, RunFacts
from holdfast.training.reporting.learning import best_epoch
from holdfast.training.reporting.wording import number, plural

SCRIPT = "script"
AFTER_TRAINING = ("selection", "export", "promotion")
"""Sections for what follows training, where the script hands a champion over."""
ENDS = {
    "completed": "training has ended",
    "preempted": "stopped by a notice, and saved",
    "failed": "the last segment failed",
    "killed": "the last segment was killed",
    "running": "training goes on",
}


def is_trained_alone(facts: RunFacts) -> bool:
    """Whether the page is of a script that has, so far, done nothing but train."""
    return facts.record.script is not None and not facts.candidates


def summary(facts: RunFacts) -> str:
    """How far the script has come, in a sentence."""
    if not facts.segments:
        return "No step is done yet."
    how_far = f"{told_progress(facts)} done; {ENDS[facts.segments[-1].outcome]}."
    best = best_epoch(facts)
    return how_far if best is None else f"{how_far} Best {told_best(facts, best)}."


def told_progress(facts: RunFacts) -> str:
    """Steps, and epochs where the script has any."""
    steps = plural(_num_steps(facts), "step")
    return f"{steps} in {plural(facts.num_epochs, 'epoch')}" if facts.num_epochs else steps


def told_best(facts: RunFacts, best: Epoch) -> str:
    """The best value of the metric that decides, and where it was."""
    value = number(best.metrics[facts.metric])
    return f"validation {facts.metric} {value}, at step {number(best.step, 0)}"


def tiles(facts: RunFacts) -> Iterator[tuple[str, str, list[str]]]:
    """Name, value and words of each."""
    words = [ENDS[facts.segments[-1].outcome]] if facts.segments else []
    words += [plural(facts.num_epochs, "epoch")] if facts.num_epochs else []
    yield "Steps", number(_num_steps(facts), 0), words
    best = best_epoch(facts)
    if best is not None:
        found = number(best.metrics[facts.metric])
        yield f"Best validation {facts.metric}", found, [f"at step {number(best.step, 0)}"]


def configuration(facts: RunFacts) -> dict[str, dict[str, Any]]:
    """The script's own configuration, and those of Holdfast's settings that it goes by."""
    found = facts.record.config
    own = found.get("experiment", {})
    shown: dict[str, dict[str, Any]] = {SCRIPT: {**own, "seed": found.get("seed")}}
    left_out = (*OWN, "experiment", *(AFTER_TRAINING if is_trained_alone(facts) else ()))
    for section, values in found.items():
        if section not in left_out and isinstance(values, Mapping):
            applied = {k: v for k, v in values.items() if f"{section}.{k}" not in OWN_KEYS}
            shown |= {section: applied} if applied else {}
    return shown


def _num_steps(facts: RunFacts) -> int:
    return max((one.record.end_step for one in facts.segments), default=0)
