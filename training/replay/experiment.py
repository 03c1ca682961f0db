"""Steps of an experiment's run, done again in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

from holdfast.training.checkpointing.policy import build_schedule
from holdfast.training.errors import InputError
from holdfast.training.exactness.versions import device_name, library_versions
from holdfast.training.loop.saving import NothingSaved
from holdfast.training.loop.segment import build_trainer
from holdfast.training.loop.trainer import Trainer
from holdfast.training.replay.beginning import elsewhere, newest_before
from holdfast.training.replay.comparison import (
    AllDone,
    Comparing,
    Replayed,
    Steps,
    require_kept,
    told_to,
)
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import NoticeCameError, Stage, StageArguments, prepared_stage

TELL_EVERY_S = 5.0
Tell = Callable[[str], None]


def replay_experiment(arguments: StageArguments, steps: Steps, tell: Tell) -> Replayed:
    """Do steps of a run again, from the newest full checkpoint before them.

    Nothing of the run is changed, and it may train meanwhile.

    Args:
        arguments: of the run.
        steps: which.
        tell: is given a line now and then.

    Raises:
        InputError: there is no such run, it has not done these steps, kept none of their losses,
            or is a fork without a checkpoint before them.
        NoticeCameError: a signal came first.
    """
    with prepared_stage(replace(arguments, is_resume=True, progress_format="none")) as stage:
        require_kept(stage.run, steps)
        trainer = build_trainer(stage, Costs())
        with closing(trainer.loader):
            return _replayed(stage, trainer, steps, tell)


def _replayed(stage: Stage, trainer: Trainer, steps: Steps, tell: Tell) -> Replayed:
    state, lineage = trainer.state, stage.record.lineage
    restored = newest_before(stage.run, steps.first)
    surroundings: tuple[str, ...] = ()
    if restored is not None:
        is_its_begin = lineage is not None and restored.manifest.step == lineage.step
        state.restore(restored.tensors, restored.state, lineage if is_its_begin else None)
        device = device_name(state.loss_sum.device.type)
        surroundings = elsewhere(restored.manifest, library_versions(), device)
    elif lineage is not None:
        raise InputError(
            f"{stage.run.path} is a fork, and has no full checkpoint before step {steps.first} any "
            f"more: name later steps"
        )
    begun_after = state.counters.step
    told_to(tell, steps, begun_after)
    comparing, told_s = Comparing(stage.run, steps, begun_after), time.monotonic()

    def on_step(step: int) -> None:
        nonlocal told_s
        comparing.add(step, trainer.train_step.last_loss)
        if time.monotonic() - told_s >= TELL_EVERY_S:
            told_s = time.monotonic()
            tell(f"step {step:,} of {steps.last:,}")

    saver = NothingSaved(
        build_schedule(stage.config.checkpoint),
        state,
        is_measured=restored is not None and restored.manifest.info.is_selectable,
    )
    try:
        ended = trainer.fit(saver, on_step)
    except AllDone:
        return comparing.result(surroundings)
    if ended.outcome == "preempted":
        raise NoticeCameError(ended.notice)
    return comparing.result(surroundings)
