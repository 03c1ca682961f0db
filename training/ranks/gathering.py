"""Saves of weights that lie in slices: whenever rank 0 takes a snapshot, all gather for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from holdfast.training.distributed.world import World
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.trainer import Saving
from holdfast.training.preemption.notices import Notice

GATHER, DONE = "gather", "done"


def saving_of_first(state: TrainState, saver: Saving, world: World) -> Saving:
    """What rank 0 saves by: the saver, which has the other ranks gather where there are slices."""
    if state.spread is None:
        return saver
    state.spread.before_gathering = lambda: _tell(world, GATHER)
    return _Followed(saver, lambda: _tell(world, DONE))


def saving_of_other(state: TrainState, saver: Saving, world: World) -> Saving:
    """What another rank saves by: nothing, but it gathers with rank 0 where there are slices."""

    def follow() -> None:
        while world.from_first(None) == GATHER:
            state.capture()

    return saver if state.spread is None else _Followed(saver, follow)


def _tell(world: World, what: str) -> None:
    world.beat()
    world.from_first(what)


class _Followed:
    """A saver; after each call that may take snapshots, the ranks agree that it has ended."""

    def __init__(self, saver: Saving, after: Callable[[], None]) -> None:
        self._saver = saver
        self._after = after

    def is_light_due(self) -> bool:
        """As ``Saving.is_light_due``."""
        return self._saver.is_light_due()

    def after_step(self, measured: Mapping[str, float] | None = None) -> None:
        """As ``Saving.after_step``."""
        self._saver.after_step(measured)
        self._after()

    def after_epoch(self, metrics: Mapping[str, float], *, is_last: bool) -> None:
        """As ``Saving.after_epoch``."""
        self._saver.after_epoch(metrics, is_last=is_last)
        self._after()

    def finish(self) -> None:
        """As ``Saving.finish``."""
        self._saver.finish()
        self._after()

    def stop(self, notice: Notice) -> None:
        """As ``Saving.stop``."""
        self._saver.stop(notice)
        self._after()
