"""One stop step for all ranks, whichever of them gets a notice."""

from __future__ import annotations

import time
from collections.abc import Iterable

from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.distributed.world import World
from holdfast.training.preemption.notices import Notice, PreemptionMonitor, PreemptionSource

STOP = "stop"


class AgreedMonitor(PreemptionMonitor):
    """Its ``notice`` is there once all ranks know of it, which is after the same step.

    Each rank says with each step whether it has a notice of its own, along with the losses: that
    costs nothing, and there is no step after which one rank stops and another goes on.
    """

    def __init__(self, sources: Iterable[PreemptionSource], world: World) -> None:
        super().__init__(sources)
        self._world = world
        self._agreed: Notice | None = None
        self._is_told = False

    @property
    def notice(self) -> Notice | None:
        """The notice that all ranks stop for."""
        return self._agreed

    def has_own(self) -> bool:
        """Whether this rank has a notice; what it is, is told to the others first."""
        own = super().notice
        if own is not None and not self._is_told:
            self._is_told = True
            reason = f"{own.reason} (rank {self._world.rank})"
            remaining_s = own.remaining_s(time.monotonic())
            self._world.tell(STOP, [own.source, reason, remaining_s])
        return own is not None

    def has_any(self) -> bool:
        """Whether any rank is known to have one: what is long may be cut short."""
        return self.has_own() or self._world.told_so_far(STOP) is not None

    def agree(self) -> None:
        """Stop: all ranks know that one has a notice."""
        source, reason, remaining_s = self._world.told(STOP)
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        self._agreed = super().notice or Notice(source, reason, deadline_s)

    def vote(self) -> None:
        """Collective. Stop if any rank has a notice."""
        if self._world.is_any(self.has_own()):
            self.agree()


def sources_of_rank(config: PreemptionConfig, rank: int) -> PreemptionConfig:
    """What a rank listens to: rank 0 to everything, the others to signals."""
    if rank == 0:
        return config
    sources = tuple(name for name in config.sources if name == "signal")
    changed = {"sources": sources, "sentinel_file": None, "max_wall_time_s": None}
    return config.model_copy(update=changed)
