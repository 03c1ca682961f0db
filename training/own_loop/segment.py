"""One process life of a script's training: what stands behind its steps."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.training.checkpointing.loading import RestoredCheckpoint
from holdfast.training.checkpointing.manager import CheckpointIdentity, CheckpointManager
from holdfast.training.checkpointing.manifest import local_folder, manifest_digest
from holdfast.training.checkpointing.policy import (
    build_crossings,
    build_retention,
    build_schedule,
    mean_time_between_preemptions_s,
)
from holdfast.training.code.archive import keep_code
from holdfast.training.configuration.loading import digested_values
from holdfast.training.device.reading import device_reader
from holdfast.training.exactness.versions import device_name, library_versions
from holdfast.training.loop.experiment_state import Stateful
from holdfast.training.loop.loss_guard import LossGuard
from holdfast.training.loop.loss_record import LossRecord
from holdfast.training.loop.saving import NothingSaved, Saver
from holdfast.training.loop.segment_record import RecordKeeper
from holdfast.training.loop.state import Counters, EpochRecord
from holdfast.training.loop.state_validation import validate_state
from holdfast.training.own_loop.environment import note_outcome
from holdfast.training.own_loop.host import current_host
from holdfast.training.own_loop.kept import VALUES, Kept, require_plain
from holdfast.training.own_loop.looking import Traced, seen_variables
from holdfast.training.own_loop.opening import Opened
from holdfast.training.own_loop.state import Form, Place, Whole, state_of
from holdfast.training.own_loop.taking_over import take_over
from holdfast.training.preemption.notices import Notice, reclaim_signals
from holdfast.training.preemption.signals import current_signal_flag
from holdfast.training.runs.costs import Costs
from holdfast.training.runs.directory import (
    has_ended,
    read_segments,
    run_identity,
    write_run_record_once,
)
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.segment_log import SegmentLog, log_path
from holdfast.training.stage import NoticeCameError, await_checkpoint
from holdfast.training.tiers.bandwidth import UploadPace
from holdfast.training.tracking.sending import Trackers
from holdfast.training.tracking.tracker import check_trackers

logger = logging.getLogger(__name__)

BEGIN = "begin"
"""What other processes of the script begin with: the segment, and the checkpoint; or nothing."""


class ScriptSegment:
    """Restores the newest good checkpoint, saves after steps, and leaves a record."""

    def __init__(
        self, opened: Opened, kept: Kept, loaders: Mapping[str, Stateful], place: Place
    ) -> None:
        """Take the run over, and put back what it had.

        Raises NoticeCameError where a notice came first, else what those raise.
        """
        self._opened, self._place = opened, place
        self._config = opened.config
        self._costs = Costs()
        self._closing = ExitStack()
        self._pace: tuple[float, int] | None = None
        self._losses: LossRecord | None = None
        self._start_step = 0
        self._restored: RestoredCheckpoint | None = None
        self._tracing = ExitStack()
        check_trackers(opened.config.tracking)
        self._trackers = Trackers(opened.run, opened.config.tracking, opened.progress)
        whole = Whole(kept, loaders, place)
        require_plain(kept.values, VALUES)
        self.state = state_of(kept, opened.config, whole)
        kept.tell_of_lost_schedule()
        self._form = Form(self.state)
        try:
            self._take_over()
        except NoticeCameError as error:
            self._leave(error.notice)
            raise

    def _take_over(self) -> None:
        """Become the run's only writer, and put back what the newest good checkpoint has."""
        opened = self._opened
        is_allowed = opened.is_mismatch_allowed
        record = write_run_record_once(opened.run, opened.record, is_mismatch_allowed=is_allowed)
        self._lease = self._closing.enter_context(
            Lease.acquire(opened.run, self._config.preemption.lease_ttl_s)
        )
        if opened.script is not None:
            keep_code(opened.run, self._lease, opened.script)
        self._keeper = RecordKeeper(
            opened.run, self._lease, self._costs.seconds, self._config.logging.every_s
        )
        log = opened.log or SegmentLog()
        log.open(log_path(opened.run.logs, self._keeper.number))
        if opened.log is None:
            self._closing.callback(log.close)
        identity = CheckpointIdentity(
            config_digest=opened.record.config_digest if is_allowed else record.config_digest,
            versions=library_versions(),
            device=device_name(self.state.loss_sum.device.type),
            segment=self._keeper.number,
            config=digested_values(self._config),
            run=run_identity(record),
        )
        retention = build_retention(
            self._config.checkpoint, self._config.selection, self._config.ema
        )
        self._manager = CheckpointManager(
            opened.run,
            self._lease,
            identity,
            retention,
            await_files=partial(await_checkpoint, opened.run, opened.monitor),
        )
        with self._costs.measured("restore"):
            restored = self._restore(is_allowed or bool(record.taken_over))
        self._tell_begin(restored)
        if is_allowed:
            place = self._keeper.number, self.step
            take_over(opened.run, self._lease, record, opened.record, place)
        self._saver: Saver | NothingSaved = self._build_saver()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.state.counters.step

    @property
    def has_begun(self) -> bool:
        """Whether a step has."""
        return self._pace is not None

    def before_step(self) -> Notice | None:
        """Begin the segment's record at its first step. The notice that there is."""
        if self._pace is None:
            reclaim_signals("before the first step")
            copies = self._opened.copies
            self._keeper.begin(self.step, None if copies is None else copies.world.size)
            note_outcome(run=str(self._opened.run.path), start_step=self.step)
            self._opened.progress.emit("started", step=self.step, segment=self._keeper.number)
            self._mark_beginning()
            self._losses = LossRecord(
                self._opened.run, self._keeper.number, self.step, self._config.logging.every_s
            )
            self._trackers.start()
        self._look()
        return self._opened.monitor.notice

    def is_over(self) -> bool:
        """Whether a trial ends here, before the script's own end."""
        return self.step == self._opened.trial.end_at

    def after_step(self, logged: Mapping[str, Any], num_steps: int | None) -> None:
        """The state is whole: count the step, tell of it, and save where that is due."""
        self._count()
        self._take_loss(logged.get("loss"))
        if self._opened.progress.is_due():
            self._tell(logged, num_steps)
        self._keeper.advance(self.step)
        self._tracing.close()
        self._stop_trial()

    def _put_back(self, restored: RestoredCheckpoint) -> None:
        self.state.restore(restored.tensors, restored.state)
        self._restored = restored  # up to the first step

    def begin_steps_of_epoch(self) -> None:
        """Undo what stands before the steps of an epoch, which was done when the epoch began.

        Of an epoch that goes on, the state that was saved has it already. Where somebody asked for
        another configuration, what the script sets by it stays.
        """
        goes_on = self._place.step > 0 or self._place.has_begun
        if self._restored is not None and goes_on and not self._opened.is_mismatch_allowed:
            self.state.restore(self._restored.tensors, self._restored.state)
        self._restored = None
        self._place.has_begun = True

    def _mark_beginning(self) -> None:
        self._restored = None
        self._pace, self._start_step = (time.monotonic(), self.step), self.step

    def _stop_trial(self) -> None:
        trial, copies = self._opened.trial, self._opened.copies
        if copies is None:
            trial.after_step(self.step)
        else:
            trial.after_step(self.step, copies.world.rank, copies.world.launcher_pid)

    def _count(self) -> None:
        state, counters = self.state, self.state.counters
        state.counters = replace(
            counters, step=counters.step + 1, step_in_epoch=counters.step_in_epoch + 1
        )
        state.averages.update(state.model, self.step)
        state.schedule.after_step()

    def save_if_due(self) -> None:
        """Save where the schedule says so."""
        self._saver.after_step()

    def validated(self, metrics: Mapping[str, float]) -> None:
        """Put metrics into the history, and save what selection may choose."""
        state, counters = self.state, self.state.counters
        num_losses = self._place.num_losses
        record = EpochRecord(
            epoch=counters.epoch,
            step=counters.step,
            train_loss=state.loss_sum.item() / num_losses if num_losses else math.nan,
            learning_rate=state.schedule.rate,
            metrics=dict(metrics),
        )
        state.history.append(record)
        state.loss_sum.zero_()
        self._place.num_losses = 0
        state.counters = Counters(step=counters.step, epoch=counters.epoch + 1, step_in_epoch=0)
        self._opened.progress.emit(
            "validation",
            number=record.epoch + 1,
            step=record.step,
            train_loss=record.train_loss,
            learning_rate=record.learning_rate,
            metrics={**metrics},
        )
        self._saver.after_epoch(metrics, is_last=False)

    def stop(self, notice: Notice) -> None:
        """Save before the machine goes away, and let the run go."""
        self._tell_notice(notice)
        self._saver.stop(notice)
        self._end("preempted", notice)

    def _leave(self, notice: Notice | None) -> None:
        """Let the run go before the first step; there is nothing to save."""
        assert notice is not None
        if self._opened.copies is not None:
            self._opened.copies.world.tell(BEGIN, None)
        self._tell_notice(notice)
        self.close()

    def _tell_notice(self, notice: Notice) -> None:
        self._opened.progress.emit("notice", source=notice.source, reason=notice.reason)
        note_outcome(run=str(self._opened.run.path), source=notice.source)

    def finish(self) -> None:
        """Save what is not saved yet, and let the run go."""
        if self._pace is not None:
            self._sync_losses()
            self._saver.last()
            self._end("completed", None)
        else:  # there was nothing left to do, but maybe to send
            self._trackers.start()
            self._trackers.is_completed = True
            if self.step and not has_ended(self._opened.run):  # it was killed after its last save
                self._keeper.begin(self.step)
                self._end("completed", None)
        self.close()
        if current_host() is None:
            current_signal_flag().uninstall()  # what the script does now, signals may end

    def fail(self, error: BaseException) -> None:
        """Let the save in flight end, record the error, and let the run go."""
        try:
            self._saver.settle()
        except RuntimeError:  # the interpreter is leaving, and starts no thread any more
            logger.warning("the save in flight could not end; the checkpoint before it counts")
        if self._pace is not None:
            self._keeper.fail(error)
        self.close()

    def close(self) -> None:
        """Let the run go."""
        if self._losses is not None:
            self._losses.close()
            self._losses = None
        self._trackers.close()
        self._closing.close()
        self._opened.monitor.stop()

    def _sync_losses(self) -> Callable[[], None]:
        """A checkpoint covers steps whose losses are on disk; one that differs may stop it."""
        return self._losses.sync_later() if self._losses is not None else lambda: None

    def _before_save(self) -> Callable[[], None]:
        self._form.tell_if_new()
        return self._sync_losses()

    def _look(self) -> None:
        trial = self._opened.trial
        if trial.should_look(self.step, is_first=self.step == self._start_step):
            trial.write_look(self.step, seen_variables())
        if trial.trace_file is not None and self.step + 1 == trial.trace_step:
            self._tracing.enter_context(Traced(Path(trial.trace_file)))

    def _end(self, outcome: str, notice: Notice | None) -> None:
        if self._losses is not None:
            self._losses.flush()
        self._trackers.is_completed = outcome == "completed"
        self._keeper.end(outcome, self.step, notice, self._manager.save_s())
        if current_host() is None:
            self._opened.progress.emit("outcome", outcome=outcome, step=self.step)
        self.close()

    def _take_loss(self, loss: float | Tensor | None) -> None:
        if loss is None:
            if self._losses is not None:  # its file has one for each step, or ends
                self._losses.close()
                self._losses = None
            return
        taken = torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
        taken = taken.detach().reshape(())
        self.state.loss_sum += taken.to(self.state.loss_sum)
        self._place.num_losses += 1
        if self._losses is not None:
            self._losses.add(taken.clone())

    def _tell(self, logged: Mapping[str, Any], num_steps: int | None) -> None:
        assert self._pace is not None
        start_s, start_step = self._pace
        pace = (self.step - start_step) / max(time.monotonic() - start_s, 1e-9)
        scalars = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in logged.items()
        }
        self._opened.progress.emit(
            "progress", step=self.step, num_steps=num_steps, **scalars, steps_per_s=pace
        )

    def _tell_begin(self, restored: RestoredCheckpoint | None) -> None:
        if self._opened.copies is None:
            return
        folder = None if restored is None else local_folder(restored.path)
        told = {
            "segment": self._keeper.number,
            "step": None if restored is None else restored.manifest.step,
            "digest": None if folder is None else manifest_digest(folder),
        }
        self._opened.copies.world.tell(BEGIN, told)

    def _restore(self, should_allow_mismatch: bool) -> RestoredCheckpoint | None:
        restored = self._manager.restore(
            should_allow_mismatch=should_allow_mismatch,
            validate=validate_state,
            device=device_reader(self.state.loss_sum.device),
        )
        if restored is not None:
            self._put_back(restored)
            self._opened.progress.emit("restored", step=self.step, path=str(restored.path))
        return restored

    def _build_saver(self) -> Saver:
        config = self._config
        saver = Saver(
            manager=self._manager,
            schedule=build_schedule(config.checkpoint),
            crossings=build_crossings(config.checkpoint),
            mtbp_s=mean_time_between_preemptions_s(
                read_segments(self._opened.run)[:-1],
                config.checkpoint.mean_time_between_preemptions_s,
            ),
            state=self.state,
            guard=LossGuard(self.state.loss_sum.device),
            monitor=self._opened.monitor,
            preemption=config.preemption,
            progress=self._opened.progress,
            costs=self._costs,
            pace=UploadPace(self._opened.run, config.preemption.grace_period_s),
        )
        saver.before_save = self._before_save
        return saver
