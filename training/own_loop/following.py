"""One process life of a script's training, in another process than its first: it trains along."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from holdfast.training.checkpointing.loading import load_checkpoint
from holdfast.training.checkpointing.manifest import local_folder, manifest_digest, manifest_of
from holdfast.training.checkpointing.policy import build_schedule
from holdfast.training.errors import RankLostError
from holdfast.training.loop.saving import NothingSaved
from holdfast.training.own_loop.segment import BEGIN, ScriptSegment
from holdfast.training.preemption.notices import Notice, reclaim_signals
from holdfast.training.runs.segment_log import SegmentLog, log_path
from holdfast.training.stage import NoticeCameError

logger = logging.getLogger(__name__)


class FollowingSegment(ScriptSegment):
    """Restores what rank 0 has restored, takes the same steps, and leaves writing to rank 0."""

    def _take_over(self) -> None:
        """Take nothing over: rank 0 has the run. Raises NoticeCameError or RankLostError."""
        opened = self._opened
        assert opened.copies is not None
        begin = opened.copies.world.awaited(BEGIN)
        if begin is None:
            raise NoticeCameError(None)
        log = opened.log or SegmentLog()
        log.open(log_path(opened.run.logs, begin["segment"], opened.rank))
        if opened.log is None:
            self._closing.callback(log.close)
        if begin["step"] is not None:
            self._restore_same(begin["step"], begin["digest"])
        self._saver = NothingSaved(build_schedule(self._config.checkpoint), self.state)

    def _restore_same(self, step: int, digest: str) -> None:
        folder = local_folder(self._opened.run.checkpoint(step))
        found = manifest_digest(folder)
        if found != digest:
            raise RankLostError(
                f"{folder.path} is not the checkpoint that rank 0 has restored: its manifest has "
                f"the digest {found} here, {digest} there"
            )
        restored = load_checkpoint(folder, manifest_of(folder))
        self._put_back(restored)

    def before_step(self) -> Notice | None:
        """The notice that all have agreed upon."""
        if self._pace is None:
            reclaim_signals("before the first step")
            self._mark_beginning()
        return self._opened.monitor.notice

    def after_step(self, logged: Mapping[str, Any], num_steps: int | None) -> None:  # noqa: ARG002
        """Count the step."""
        self._count()
        self._take_loss(logged.get("loss"))
        self._stop_trial()

    def stop(self, notice: Notice) -> None:
        """Rank 0 saves."""
        logger.info("stopping after step %d: %s", self.step, notice.reason)
        self.close()

    def finish(self) -> None:
        """Rank 0 saves."""
        self.close()

    def fail(self, error: BaseException) -> None:  # noqa: ARG002
        """The error is told by whoever raised it."""
        self.close()
