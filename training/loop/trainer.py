"""Trainer.fit(): from where the state stands to the end, or to a notice."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from holdfast.training.configuration.schema import RunConfig, TrainConfig
from holdfast.training.data.batch_plan import place_of
from holdfast.training.data.loader import BatchPlan, Loader, Microbatch, whole_steps
from holdfast.training.experiment.protocol import Dataset, Experiment
from holdfast.training.loop.early_stopping import EarlyStopping
from holdfast.training.loop.evaluation import evaluate, metrics_of
from holdfast.training.loop.state import Counters, EpochRecord, TrainState
from holdfast.training.loop.train_step import TrainStep
from holdfast.training.optimizers.schedule import named_metric
from holdfast.training.preemption.notices import Notice, PreemptionMonitor, reclaim_signals
from holdfast.training.runs.costs import Costs
from holdfast.training.runs.progress import Progress

logger = logging.getLogger(__name__)


def steps_of_epoch(train: TrainConfig, plan: BatchPlan, epoch: int) -> int:
    """Steps of an epoch: those that are configured, or else those of a pass over the data."""
    return train.steps_per_epoch or plan.num_steps(epoch)


@dataclass(frozen=True)
class SegmentOutcome:
    """How a segment ended, and after which step."""

    outcome: Literal["completed", "preempted"]
    step: int
    notice: Notice | None = None


class Saving(Protocol):
    """What decides when to save: ``Saver``, or nothing where steps are only done again."""

    def is_light_due(self) -> bool:
        """Whether this step, within an epoch, is to be validated and was not yet."""
        ...

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """A step is done, and was validated where ``measured`` has metrics."""
        ...

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """An epoch is done and validated."""
        ...

    def finish(self) -> None:
        """Training is done."""
        ...

    def stop(self, notice: Notice) -> None:
        """A notice came."""
        ...


class _Pace:
    """Steps per second since training began in this process."""

    def __init__(self, first_step: int) -> None:
        self._first_step = first_step
        self._start_s = time.monotonic()

    def steps_per_s(self, step: int) -> float:
        return (step - self._first_step) / max(time.monotonic() - self._start_s, 1e-9)


def _measured_here(trainer: Trainer) -> dict[str, float] | None:
    """Validation metrics of the weights as they are; None where a notice came first."""
    records = evaluate(
        trainer.experiment,
        trainer.state.model,
        trainer.validation,
        batch_size=trainer.config.data.evaluation_batch_size,
        should_stop=trainer.is_preempted,
    )
    return None if records is None else metrics_of(trainer.experiment, records)


@dataclass
class Trainer:
    """One segment's training. All parts are given; ``fit`` puts them to work.

    ``measure`` gives the validation metrics; None where a notice came first. ``beat`` is called
    before each step and each batch of a validation, for whoever watches whether anything happens.
    """

    experiment: Experiment
    config: RunConfig
    state: TrainState
    plan: BatchPlan
    loader: Loader
    validation: Dataset
    train_step: TrainStep
    monitor: PreemptionMonitor
    progress: Progress
    costs: Costs
    measure: Callable[[Trainer], dict[str, float] | None] = field(default=_measured_here)
    beat: Callable[[], None] = field(default=lambda: None)
    _num_steps: int | None = field(default=None, init=False)

    def fit(self, saver: Saving, on_step: Callable[[int], None]) -> SegmentOutcome:
        """Train until the configured end or a notice. ``on_step`` is told each step that is done.

        After return with ``completed`` the final checkpoint is durable; with ``preempted``, too,
        unless the notice left too little time, and then the last one counts.

        Raises:
            NonFiniteLossError, LossJumpError: a loss is NaN or infinite, or jumps where spikes are
                watched; nothing of it was saved.
            StorageError: two saves in a row failed.
            LeaseLostError: another segment writes this run now.
        """
        reclaim_signals("before the first step")
        pace = _Pace(self.state.counters.step)
        if not self._has_done_what_is_due(saver):
            return self._stop(saver)
        steps, is_first = self.steps(), True
        while not self.is_finished():
            if self.is_preempted():
                return self._stop(saver)
            microbatches = next(steps)
            if self.state.counters.step + 1 in self.state.left_out:
                self.train_step.leave_out()
            else:
                self.train_step(microbatches)
            if is_first:
                is_first = False
                reclaim_signals("after the first step")
            if self.progress.is_due():
                self._report(pace)
            on_step(self.state.counters.step)
            if self._is_at_epoch_end() or saver.is_light_due():
                if not self._has_done_what_is_due(saver):
                    return self._stop(saver)
            else:
                saver.after_step()
        saver.finish()
        return SegmentOutcome("completed", self.state.counters.step)

    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        counters, train = self.state.counters, self.config.train
        if counters.step_in_epoch != 0:
            return False
        return (
            counters.epoch >= train.num_epochs
            or (train.max_steps is not None and counters.step >= train.max_steps)
            or self.state.early_stopping.should_stop(self.config.early_stopping)
        )

    def num_steps(self) -> int:
        """Steps of the whole run, if nothing stops it early."""
        if self._num_steps is None:
            self._num_steps = max(self.epoch_ends(), default=0)
        return self._num_steps

    def epoch_ends(self) -> Iterator[int]:
        """After how many steps each epoch of the run ends, if nothing stops it early."""
        train, num_steps = self.config.train, 0
        for epoch in range(train.num_epochs):
            num_steps += steps_of_epoch(train, self.plan, epoch)
            if train.max_steps is not None and num_steps >= train.max_steps:
                yield train.max_steps
                return
            yield num_steps

    def steps(self) -> Iterator[list[Microbatch]]:
        """The microbatches of each step from where the state stands, without an end."""
        microbatches = self.loader.steps(*self._place(), self.state.stream_state)
        for step in whole_steps(microbatches):
            self.state.stream_state = step[-1].stream_state
            yield step

    def _place(self) -> tuple[int, int]:
        """The pass over the data and the step in it that comes next."""
        counters = self.state.counters
        if self.config.train.steps_per_epoch is None:
            return counters.epoch, counters.step_in_epoch
        return place_of(self.plan, counters.step)

    def is_preempted(self) -> bool:
        """Whether a notice has come."""
        self.beat()
        return self.monitor.notice is not None

    def _is_at_epoch_end(self) -> bool:
        """Whether the last step of an epoch is done and its validation is not."""
        counters = self.state.counters
        if counters.step_in_epoch == 0:
            return False
        length = steps_of_epoch(self.config.train, self.plan, counters.epoch)
        is_last_step = counters.step_in_epoch >= length
        return is_last_step or counters.step == self.config.train.max_steps

    def _has_done_what_is_due(self, saver: Saving) -> bool:
        """End the epoch, or measure a light checkpoint. False where a notice cut it short."""
        if self._is_at_epoch_end():
            return self._end_epoch(saver)
        if saver.is_light_due():
            metrics = self._validate()
            if metrics is None:
                return False
            saver.after_step(metrics)
        return True

    def _end_epoch(self, saver: Saving) -> bool:
        """Validate, record, adapt the rate, save. False where a notice cut validation short."""
        metrics = self._validate()
        if metrics is None:
            return False
        self._record_epoch(metrics)
        saver.after_epoch(metrics, is_last=self.is_finished())
        return True

    def _validate(self) -> dict[str, float] | None:
        """Metrics of the weights as they are; None where a notice cut it short."""
        reclaim_signals(f"in epoch {self.state.counters.epoch + 1}")
        self.train_step.guard.check()
        with self.costs.measured("evaluating"):
            metrics = self.measure(self)
        if metrics is not None:
            reclaim_signals("after a validation")
        return metrics

    def _record_epoch(self, metrics: dict[str, float]) -> None:
        state, counters = self.state, self.state.counters
        record = EpochRecord(
            epoch=counters.epoch,
            step=counters.step,
            train_loss=state.loss_sum.item() / state.num_done_in_epoch,
            learning_rate=state.schedule.rate,
            metrics=metrics,
        )
        state.history.append(record)
        state.loss_sum.zero_()
        state.counters = Counters(step=counters.step, epoch=counters.epoch + 1, step_in_epoch=0)
        state.schedule.after_epoch(metrics)
        state.early_stopping = self._early_stopping_after(metrics)
        self.progress.emit(
            "validation",
            epoch=record.epoch,
            step=record.step,
            train_loss=record.train_loss,
            learning_rate=record.learning_rate,
            metrics={**metrics},
        )

    def _early_stopping_after(self, metrics: dict[str, float]) -> EarlyStopping:
        for key, name in self.config.ranking_metrics.items():
            if math.isnan(named_metric(metrics, name, key)):
                logger.warning(
                    "%s = %r is NaN after step %d: by it that checkpoint cannot win, and its epoch "
                    "counts as one without an improvement; look at the model and at the metric",
                    key,
                    name,
                    self.state.counters.step,
                )
        metric, mode = self.config.early_stopping_ranking
        return self.state.early_stopping.after(metrics[metric], self.config.early_stopping, mode)

    def _stop(self, saver: Saving) -> SegmentOutcome:
        notice = self.monitor.notice
        assert notice is not None
        self.progress.emit("notice", source=notice.source, reason=notice.reason)
        saver.stop(notice)
        return SegmentOutcome("preempted", self.state.counters.step, notice)

    def _report(self, pace: _Pace) -> None:
        counters = self.state.counters
        self.progress.emit(
            "progress",
            step=counters.step,
            num_steps=self.num_steps(),
            epoch=counters.epoch,
            loss=self.train_step.last_loss.item(),
            steps_per_s=pace.steps_per_s(counters.step),
        )
