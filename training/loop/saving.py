"""When the trainer saves, and what it does about a save that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from holdfast.training.checkpointing.finite import non_finite
from holdfast.training.checkpointing.manager import CheckpointContents, CheckpointManager, Published
from holdfast.training.checkpointing.policy import (
    KeepCrossing,
    Kind,
    SaveMoment,
    SaveSchedule,
    Trigger,
)
from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.errors import HoldfastError, NonFiniteStateError, StorageError
from holdfast.training.loop.loss_guard import LossGuard
from holdfast.training.loop.state import TrainState
from holdfast.training.preemption.notices import (
    Notice,
    PreemptionMonitor,
    grace_warning,
    stop_decision,
)
from holdfast.training.runs.costs import Costs
from holdfast.training.runs.progress import Progress
from holdfast.training.tiers.bandwidth import UploadPace

logger = logging.getLogger(__name__)


def _nothing() -> None:
    """What is left to do where nothing is."""


class ValidationsWithin:
    """Which steps within an epoch are validated: those of the schedule, each of them once."""

    def __init__(self, schedule: SaveSchedule, state: TrainState, *, is_measured: bool) -> None:
        """``is_measured``: the state as it is was validated before it was saved."""
        self._schedule = schedule
        self._state = state
        self._measured_step = state.counters.step if is_measured else None

    def is_due(self) -> bool:
        """Whether this step is to be validated and was not yet."""
        counters = self._state.counters
        is_due = self._schedule.is_light_due(counters.step, counters.epoch, is_epoch_end=False)
        is_within = counters.step_in_epoch > 0
        return is_within and is_due and counters.step != self._measured_step

    def mark_done(self) -> None:
        """This step was validated."""
        self._measured_step = self._state.counters.step


class Saver:
    """Saves a TrainState at the moments that the schedule names.

    A save that failed is told, and training goes on; it is tried again from its snapshot when the
    next one is due, so that a disk that was full for a while costs nothing, not even a checkpoint
    that selection may want. A second failure in a row is raised.

    A light checkpoint never takes the place of a full one of the same step, and is made full where
    a full one is due as well: then its trigger and its metrics stay, so that what may be selected
    does not depend on when full ones are written.

    Attributes:
        before_save: called before each snapshot is taken; what it returns is called before the
            checkpoint is written, in any thread.
    """

    def __init__(  # noqa: PLR0913  # the parts of a segment that saving needs
        self,
        *,
        manager: CheckpointManager,
        schedule: SaveSchedule,
        crossings: Sequence[KeepCrossing],
        mtbp_s: float,
        state: TrainState,
        guard: LossGuard,
        monitor: PreemptionMonitor,
        preemption: PreemptionConfig,
        progress: Progress,
        costs: Costs,
        pace: UploadPace,
    ) -> None:
        self._manager = manager
        self._schedule = schedule
        self._crossings = tuple(crossings)
        self._mtbp_s = mtbp_s
        self._state = state
        self._guard = guard
        self._monitor = monitor
        self._preemption = preemption
        self._progress = progress
        self._costs = costs
        self._pace = pace
        self._has_failed = False
        self._last_save_s = time.monotonic()
        self._last_save_step = self._snapshot_step = state.counters.step
        self._light: tuple[int, Trigger, Mapping[str, float]] | None = None
        restored = manager.restored
        if restored is not None:
            pace.note_saved(restored.step)
        is_measured = restored is not None and restored.is_selectable
        self._validations = ValidationsWithin(schedule, state, is_measured=is_measured)
        self._has_advance_notice = False
        self._is_grace_checked = False
        self.before_save: Callable[[], Callable[[], None]] = lambda: _nothing

    def prepare(self) -> None:
        """Have the memory of the first save taken in the background; after the first step.

        Only then an optimizer has its state.
        """
        tensors, _ = self._state.capture()
        self._manager.reserve(tensors, self._state.changed_by_updates(tensors))

    def is_light_due(self) -> bool:
        """Whether this step, within an epoch, is to be validated and was not yet."""
        return self._validations.is_due()

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """Save if it is due; ``measured`` are validation metrics, where a light one is due.

        Raises StorageError where two saves in a row failed.
        """
        self._collect()
        if (advance := self._monitor.take_advance()) is not None:
            self._has_advance_notice = True
            logger.info(
                "%s: %s; the next save is brought forward, and training goes on",
                advance.source,
                advance.reason,
            )
        trigger = self._due(is_epoch_end=False)
        if measured is not None:
            self._validations.mark_done()
            self._save_light("light", measured, must_be_full=trigger is not None)
        elif trigger is not None:
            self._save(trigger, {})

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """Save what selection may choose, and where a threshold is reached; the last one always."""
        self._collect()
        counters = self._state.counters
        is_due = is_last or self._due(is_epoch_end=True) == "epoch"
        is_light = self._schedule.is_light_due(counters.step, counters.epoch, is_epoch_end=True)
        validations = [record.metrics for record in self._state.history]
        is_crossing = any(one.is_newly_reached(validations) for one in self._crossings)
        if is_due:
            self._save("epoch", metrics)
        elif is_light:
            self._save_light("epoch", metrics, must_be_full=is_crossing)
        elif is_crossing:
            self._save("threshold", metrics)

    def last(self) -> None:
        """Save the state that training ends with, unless it is saved; durable after return."""
        if self._state.counters.step != self._last_save_step:
            self._save("end", {})
        self.finish()

    def finish(self) -> None:
        """Wait until the last save is durable."""
        with self._costs.measured("saving"):
            self._wait()

    @contextmanager
    def settled_on_error(self) -> Iterator[None]:
        """Where the block fails, let the save in flight end first: it is of a good step.

        One that failed is tried again, once.
        """
        try:
            yield
        except BaseException:
            self.settle()
            raise

    def settle(self) -> None:
        """Let the save in flight end; one that failed is tried again, once. Raises nothing.

        Of several processes that write, the others are not asked any more.
        """
        try:
            if self._has_failed and not self._manager.is_in_flight and self._manager.is_alone:
                self._manager.retry()
            self._manager.wait()
        except HoldfastError as error:
            logger.warning("the last save failed, too: %s", error)

    def stop(self, notice: Notice) -> None:
        """Save before the machine goes away, if there is time for it."""
        step = self._state.counters.step
        decision = stop_decision(
            notice, now_s=time.monotonic(), step_s=0.0, save_s=self._manager.durable_s
        )
        if decision == "trust_last_checkpoint":
            save_s = self._manager.durable_s
            logger.warning(
                "the notice leaves %.1f s, %s: stopping without a save",
                notice.remaining_s(time.monotonic()),
                "too little" if save_s is None else f"a save takes {save_s:.1f} s",
            )
            self._manager.end_overlap()
            return
        if step != self._last_save_step:
            self._save_at_notice()
        self.finish()

    def _save_at_notice(self) -> None:
        if self._light is not None and self._light[0] == self._state.counters.step:
            _, trigger, metrics = self._light
            self._save(trigger, metrics)
        else:
            self._save("notice", {})

    def _save_light(
        self, trigger: Trigger, metrics: Mapping[str, float], *, must_be_full: bool
    ) -> None:
        step = self._state.counters.step
        is_full = must_be_full or step == self._last_save_step
        self._light = (step, trigger, metrics)
        self._save(trigger, metrics, "full" if is_full else "weights")

    def _due(self, *, is_epoch_end: bool) -> Trigger | None:
        counters = self._state.counters
        moment = SaveMoment(
            step=counters.step,
            epoch=counters.epoch,
            is_epoch_end=is_epoch_end,
            now_s=time.monotonic(),
            last_save_s=self._last_save_s,
            last_save_step=self._last_save_step,
            is_in_flight=self._manager.is_in_flight,
            has_advance_notice=self._has_advance_notice,
        )
        return self._schedule.due(
            moment,
            cost_s=self._manager.snapshot_s,
            mtbp_s=self._mtbp_s,
            upload_s=self._pace.upload_s,
        )

    def _save(self, trigger: Trigger, metrics: Mapping[str, float], kind: Kind = "full") -> None:
        check_losses = self._guard.check_later()
        if not (is_beside := self._manager.has_overlap):
            check_losses()
        if self._is_spike_ahead(trigger):
            return
        end_losses = self.before_save()
        if not is_beside:
            end_losses()
        with self._costs.measured("saving"):
            self._wait()
            tensors, state = self._state.capture()
            if not is_beside:
                self._require_finite_weights()
            counters = self._state.counters
            self._manager.save(
                CheckpointContents(
                    step=counters.step,
                    epoch=counters.epoch,
                    trigger=trigger,
                    metrics=metrics,
                    tensors=tensors,
                    state=state,
                    must_be_finite=self._state.must_be_finite(tensors, with_weights=is_beside),
                    finite_as=self._state.finite_as(),
                    kind=kind,
                    late=self._state.changed_by_updates(tensors) if is_beside else {},
                    checks=(check_losses, end_losses) if is_beside else (),
                )
            )
        self._snapshot_step = counters.step
        if kind == "full":
            self._last_save_s, self._last_save_step = time.monotonic(), counters.step
            self._has_advance_notice = False

    def _is_spike_ahead(self, trigger: Trigger) -> bool:
        """Whether the next loss will not be finite, and is watched for: there is nothing to save.

        What the clock has asked for must not decide whether the run fails or goes back.
        """
        if self._state.watch is None or trigger not in ("time", "steps", "notice"):
            return False
        return bool(non_finite(dict(self._state.model.named_parameters())))

    def _require_finite_weights(self) -> None:
        """Raise NonFiniteStateError where a resume from these weights could not go on.

        The rest of the state is looked at when it is written, which does not hold training up.
        """
        parameters = dict(self._state.model.named_parameters())
        bad = non_finite(parameters)
        if not bad:
            return
        step, first = self._state.counters.step, self._last_save_step + 1
        gradients = {
            name: parameter.grad
            for name, parameter in parameters.items()
            if parameter.grad is not None and parameter.grad.layout == torch.strided
        }
        bad_gradients = non_finite(gradients)
        gradient = f"that of {bad_gradients[0]} is not finite" if bad_gradients else "is finite"
        began = f"after step {step}" if first >= step else f"in steps {first} to {step}"
        others = f", with {len(bad) - 1} others" if len(bad) > 1 else ""
        raise NonFiniteStateError(
            f"the parameter {bad[0]} is not finite any more{others}: it began {began}; the losses "
            f"were finite, and of the last gradient {gradient}. Nothing was saved since the last "
            f"checkpoint: look for a square root, a logarithm or a division whose slope is "
            f"infinite, lower the learning rate, or clip gradients",
            step=step,
            tensor=bad[0],
        )

    def _collect(self) -> None:
        """Learn what became of the save in flight."""
        try:
            published = self._manager.poll()
        except StorageError as error:
            self._tell_failure(error)
            return
        if published is not None:
            self._tell_success(published)

    def _wait(self) -> None:
        """Wait for the save in flight; one that failed is tried again."""
        if self._has_failed:
            self._manager.retry()
        try:
            self._manager.wait()
        except StorageError as error:
            self._tell_failure(error)
            self._wait()
        else:
            self._collect()

    def _tell_success(self, published: Published) -> None:
        self._has_failed = False
        self._progress.emit("saved", step=published.step, duration_s=published.durable_s)
        if published.kind == "full":
            self._pace.note_saved(published.step)
            self._check_grace(published.durable_s)

    def _tell_failure(self, error: StorageError) -> None:
        if self._has_failed:
            raise error
        self._has_failed = True
        logger.warning(
            "the save of step %d failed and is tried again when the next one is due; older "
            "checkpoints are good: %s",
            self._snapshot_step,
            error,
        )

    def _check_grace(self, save_s: float) -> None:
        if self._is_grace_checked:
            return
        self._is_grace_checked = True
        warning = grace_warning(
            grace_period_s=self._preemption.grace_period_s, step_s=0.0, save_s=save_s
        )
        if warning is not None:
            logger.warning(warning)


class NothingSaved:
    """In the place of a ``Saver`` where nothing is saved: validates where training does.

    A validation leaves training alone, but what an experiment counts in one is counted again, too.
    """

    def __init__(
        self, schedule: SaveSchedule, state: TrainState, *, is_measured: bool = False
    ) -> None:
        """``is_measured``: the state as it is was validated before it was saved."""
        self._state = state
        self._validations = ValidationsWithin(schedule, state, is_measured=is_measured)

    def is_light_due(self) -> bool:
        """As ``Saver.is_light_due``."""
        return self._validations.is_due()

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """Save nothing."""
        if measured is not None:
            self._validations.mark_done()

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """Save nothing."""

    def last(self) -> None:
        """Save nothing."""

    def finish(self) -> None:
        """There is nothing to wait for."""

    def settle(self) -> None:
        """There is nothing in flight."""

    def stop(self, notice: Notice) -> None:
        """Save nothing."""
