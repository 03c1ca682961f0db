"""Steps of a script's run that are done again: as a segment, and nothing is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.training.checkpointing.policy import build_schedule
from holdfast.training.errors import InputError
from holdfast.training.exactness.versions import device_name, library_versions
from holdfast.training.loop.saving import NothingSaved
from holdfast.training.own_loop.segment import ScriptSegment
from holdfast.training.preemption.notices import Notice, reclaim_signals
from holdfast.training.replay.beginning import elsewhere, newest_before
from holdfast.training.replay.comparison import AllDone, Comparing, Steps
from holdfast.training.runs.directory import write_run_record_once


class ReplayedSegment(ScriptSegment):
    """Restores what lies before the steps, compares each loss, and ends the script after them."""

    def _take_over(self) -> None:
        """Take nothing over. Raises RunConflictError where the script has another configuration."""
        opened, trial = self._opened, self._opened.trial
        assert trial.replay_steps is not None
        # It is there: it is compared, no more.
        record = write_run_record_once(opened.run, opened.record)
        steps = Steps(*trial.replay_steps)
        restored = newest_before(opened.run, steps.first)
        begun_after = 0 if restored is None else restored.manifest.step
        if record.taken_over and begun_after < (last := record.taken_over[-1]).step:
            raise InputError(
                f"--steps {steps}: the run had another configuration up to step {last.step}: name "
                f"later steps, with a full checkpoint before them"
            )
        self._surroundings: tuple[str, ...] = ()
        if restored is not None:
            self._put_back(restored)
            device = device_name(self.state.loss_sum.device.type)
            self._surroundings = elsewhere(restored.manifest, library_versions(), device)
        self._saver = NothingSaved(build_schedule(self._config.checkpoint), self.state)
        self._comparing = Comparing(opened.run, steps, self.step)
        self._is_over = False

    def before_step(self) -> Notice | None:
        """The notice that there is."""
        if self._pace is None:
            reclaim_signals("before the first step")
            self._mark_beginning()
        return self._opened.monitor.notice

    def is_over(self) -> bool:
        """Whether the last step is done, or one differed."""
        return self._is_over

    def after_step(self, logged: Mapping[str, Any], num_steps: int | None) -> None:
        """Count the step, and compare its loss."""
        self._count()
        loss = logged.get("loss")
        self._take_loss(loss)
        if self._opened.progress.is_due():
            self._tell(logged, num_steps)
        try:
            self._comparing.add(self.step, loss)
        except AllDone:
            self._is_over = True

    def stop(self, notice: Notice) -> None:  # noqa: ARG002
        """Nothing is saved, and nothing is told: there is no result."""
        self.close()

    def finish(self) -> None:
        """Write what was found, and end the script: what comes after its loop is not for now."""
        self._write_result()
        self.close()
        sys.exit(0)

    def fail(self, error: BaseException) -> None:  # noqa: ARG002
        """The error is told by whoever raised it."""
        self.close()

    def _write_result(self) -> None:
        path = self._opened.trial.replay_file
        assert path is not None
        found = self._comparing.result(self._surroundings)
        Path(path).write_text(json.dumps(found.as_json()))
