"""One stop step for all ranks, whichever of them gets a notice."""

from __future__ import annotations

import time
from collections.abc import Iterable

from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.distributed.world import NEWCOMER, World
from holdfast.training.preemption.notices import Notice, PreemptionMonitor, PreemptionSource
from holdfast.training.preemption.sources import build_sources

STOP = "stop"
NEWCOMER_CAME = "newcomer"
"""The source of a notice by which a machine is taken in: all stay."""
OTHER_MACHINE = "other_machine"
"""The source of a notice that is for a machine which has joined the run: this one stays."""


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
            remaining_s = own.remaining_s(time.monotonic())
            self._world.tell(STOP, [*self._told(own), remaining_s])
        return own is not None

    def own_notice(self) -> Notice | None:
        """The notice that this machine goes away, where it is for this one."""
        return super().notice

    def _told(self, own: Notice) -> tuple[str, str]:
        """Source and reason, as they are for all."""
        newcomer = self._world.told_so_far(NEWCOMER)
        if newcomer is not None:  # the launcher's own signal
            return NEWCOMER_CAME, newcomer
        if self._world.first_here > 0:
            return OTHER_MACHINE, f"{own.source}: {own.reason} (rank {self._world.rank})"
        return own.source, f"{own.reason} (rank {self._world.rank})"

    def has_any(self) -> bool:
        """Whether any rank is known to have one: what is long may be cut short."""
        return self.has_own() or self._world.told_so_far(STOP) is not None

    def agree(self) -> None:
        """Stop: all ranks know that one has a notice."""
        source, reason, remaining_s = self._world.told(STOP)
        deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        own = None if source in (NEWCOMER_CAME, OTHER_MACHINE) else super().notice
        self._agreed = own or Notice(source, reason, deadline_s)

    def vote(self) -> None:
        """Collective. Stop if any rank has a notice."""
        if self._world.is_any(self.has_own()):
            self.agree()


def monitor_of(config: PreemptionConfig, world: World | None) -> PreemptionMonitor:
    """What listens for notices, in a process alone or in one of several. Raises ConfigError."""
    if world is None:
        return PreemptionMonitor(build_sources(config))
    return AgreedMonitor(build_sources(_sources_of_rank(config, world)), world)


def _sources_of_rank(config: PreemptionConfig, world: World) -> PreemptionConfig:
    """What a rank listens to: the first of each machine to everything, the others to signals.

    How long the run may take is for rank 0 to know.
    """
    if world.rank == 0:
        return config
    if world.rank == world.first_here:
        return config.model_copy(update={"max_wall_time_s": None})
    sources = tuple(name for name in config.sources if name == "signal")
    changed = {"sources": sources, "sentinel_file": None, "max_wall_time_s": None}
    return config.model_copy(update=changed)
