"""What stands in the place of a Saver while steps are done again."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.training.checkpointing.policy import SaveSchedule
from holdfast.training.loop.state import TrainState
from holdfast.training.preemption.notices import Notice


class NothingSaved:
    """Saves nothing, and asks for validations where training asked for them.

    A validation leaves training alone, but what an experiment counts in one is counted again, too.
    """

    def __init__(
        self, schedule: SaveSchedule, state: TrainState, *, is_measured: bool = False
    ) -> None:
        """``is_measured``: the state as it is was validated before it was saved."""
        self._schedule = schedule
        self._state = state
        self._measured_step = state.counters.step if is_measured else None

    def is_light_due(self) -> bool:
        """As ``Saver.is_light_due``."""
        counters = self._state.counters
        is_due = self._schedule.is_light_due(counters.step, counters.epoch, is_epoch_end=False)
        is_within = counters.step_in_epoch > 0
        return is_within and is_due and counters.step != self._measured_step

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """Save nothing."""
        if measured is not None:
            self._measured_step = self._state.counters.step

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """Save nothing."""

    def last(self) -> None:
        """Save nothing."""

    def finish(self) -> None:
        """There is nothing to wait for."""

    def settle(self) -> None:
        """There is nothing in flight."""

    def stop(self, notice: Notice) -> None:
        """Save nothing: a replay that is stopped is begun again."""
