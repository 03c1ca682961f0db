"""The last validation, repeated where another machine or other libraries go on with a run.

What differs in the last bits is to be expected there; what differs more is another model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.training.checkpointing.loading import load_weights
from holdfast.training.checkpointing.model_weights import load_model
from holdfast.training.errors import CheckpointCorruptError, CheckpointMismatchError
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.experiment_state import Stateful, restore_experiment
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.trainer import Trainer
from holdfast.training.runs.paths import RunDirectory

logger = logging.getLogger(__name__)


def repeat_validation(
    trainer: Trainer, run: RunDirectory, differences: list[str], *, is_mismatch_allowed: bool
) -> None:
    """Validate the weights of the last end of an epoch again, and tell the difference.

    Args:
        trainer: its state was restored; it is the same afterwards.
        run: whose checkpoints hold the weights.
        differences: of machine and libraries, in words; without any, nothing is done.
        is_mismatch_allowed: a metric that changed too much is told, and is no error.

    Raises:
        CheckpointMismatchError: ``selection.metric`` changed by more than
            ``checkpoint.max_metric_change``.
    """
    state = trainer.state
    if not differences or not state.history:
        return
    if state.spread is not None:
        logger.warning("weights lie in slices: the last validation is not repeated here")
        return
    last = state.history[-1]
    is_here = last.step == state.counters.step and state.counters.step_in_epoch == 0
    with _left_as_it_was(state):
        try:
            if not is_here:
                _go_back(state, run.checkpoint(last.step))
        except CheckpointCorruptError:
            logger.warning(
                "the validation of step %d cannot be repeated here: its checkpoint, or the "
                "experiment's own state in it, is gone",
                last.step,
            )
            return
        records = evaluate(
            trainer.experiment,
            state.model,
            trainer.validation,
            batch_size=trainer.config.data.evaluation_batch_size,
            should_stop=lambda: trainer.monitor.notice is not None,
        )
    if records is not None:
        found = metrics_of(trainer.experiment, records)
        _compare(trainer, last.step, last.metrics, found, is_mismatch_allowed)


def _go_back(state: TrainState, checkpoint: Path) -> None:
    """Put the weights, and the experiment's own state, of the last end of an epoch back."""
    weights = load_weights(checkpoint)
    restore_experiment(state.experiment, checkpoint)
    absent = () if state.frozen is None else state.frozen.names
    load_model(state.model, {**_unfrozen(state), **weights}, absent)


@contextmanager
def _left_as_it_was(state: TrainState) -> Iterator[None]:
    """Model and experiment are put back: observers look on, and scores may count."""
    own = {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in _unfrozen(state).items()
    }
    kept = state.experiment.state_dict() if isinstance(state.experiment, Stateful) else None
    try:
        yield
    finally:
        with torch.no_grad():
            load_model(state.model, own, () if state.frozen is None else state.frozen.names)
        if isinstance(state.experiment, Stateful) and kept is not None:
            state.experiment.load_state_dict(kept)


def _unfrozen(state: TrainState) -> dict[str, Any]:
    """The model's state dict, without what checkpoints leave out."""
    weights = state.model.state_dict()
    return weights if state.frozen is None else state.frozen.others(weights)


def _compare(
    trainer: Trainer,
    step: int,
    there: Mapping[str, float],
    here: Mapping[str, float],
    is_mismatch_allowed: bool,
) -> None:
    changes = {name: relative_change(there[name], here[name]) for name in there if name in here}
    told = ", ".join(f"{name} {there[name]:.6g} there, {here[name]:.6g} here" for name in changes)
    logger.warning("the validation of step %d was repeated on this machine: %s", step, told)
    name, bound = trainer.config.selection.metric, trainer.config.checkpoint.max_metric_change
    if changes.get(name, 0.0) <= bound:
        return
    problem = (
        f"validation {name} of step {step} changed by {changes[name]:.2%} on this machine, from "
        f"{there[name]:.6g} to {here[name]:.6g}; checkpoint.max_metric_change = {bound:g} allows "
        f"{bound:.2%}"
    )
    if not is_mismatch_allowed:
        raise CheckpointMismatchError(
            f"{problem}: go on where the run was begun, raise that bound, or allow the mismatch "
            f"(--allow-mismatch)"
        )
    logger.warning("%s; allowed", problem)


def relative_change(there: float, here: float) -> float:
    """The difference as a fraction of the larger one; infinite where only one is finite."""
    if there == here or (math.isnan(there) and math.isnan(here)):
        return 0.0
    if not (math.isfinite(there) and math.isfinite(here)):
        return math.inf
    return abs(there - here) / max(abs(there), abs(here))
