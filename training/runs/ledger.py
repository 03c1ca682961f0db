"""What the time of a run went to, from its segment records alone. Pure.

A segment lives from the start of its process to its end. One that was killed is known to have
lived as long as its last note says; what it did after that counts as waiting, because nothing of
it is left. Validation is part of useful time: the run that was never interrupted validates, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import pairwise

from holdfast.training.runs.directory import SegmentRecord

STARTING = ("startup", "restore")


@dataclass(frozen=True)
class Ledger:
    """Seconds of a run by what they went to; together they are all the time from first to last.

    Attributes:
        useful_s: steps that count, and validation.
        recomputed_s: steps that had been done before and were lost.
        saving_s: time that saves took from training.
        starting_s: the first segment's start.
        restarting_s: start and restore of every later segment.
        waiting_s: nobody trained: from the last note of a segment to the start of the next.
        num_segments: process lives.
        num_recomputed_steps: steps that were done more than once, as far as records tell.
    """

    useful_s: float
    recomputed_s: float
    saving_s: float
    starting_s: float
    restarting_s: float
    waiting_s: float
    num_segments: int
    num_recomputed_steps: int

    @property
    def paid_s(self) -> float:
        """Time in which a segment lived."""
        return self.total_s - self.waiting_s

    @property
    def total_s(self) -> float:
        """From the start of the first segment to the end of the last."""
        seconds = (getattr(self, entry.name) for entry in fields(self) if entry.name[-2:] == "_s")
        return float(sum(seconds))

    @property
    def goodput(self) -> float:
        """Useful time divided by the time that was paid for; 0 for an empty run."""
        return self.useful_s / self.paid_s if self.paid_s > 0 else 0.0

    def as_table(self) -> str:
        """One line per kind of time, with its share, and the goodput."""
        lines = [
            _row(name.removesuffix("_s"), getattr(self, name), self.total_s)
            for name in (entry.name for entry in fields(self) if entry.name.endswith("_s"))
        ]
        lines.append(_row("total", self.total_s, self.total_s))
        lines.append(
            f"goodput {self.goodput:.1%} of the time that was paid for; {self.num_segments} "
            f"segments, {self.num_recomputed_steps} steps done twice"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Life:
    """One segment on the time axis (Unix seconds), with its costs.

    Attributes:
        num_repeated: steps that an earlier segment had done.
    """

    begin_s: float
    end_s: float
    starting_s: float
    saving_s: float
    num_steps: int
    num_repeated: int

    @property
    def working_s(self) -> float:
        """Time that went into steps and validation."""
        return max(0.0, self.end_s - self.begin_s - self.starting_s - self.saving_s)

    @property
    def recomputed_s(self) -> float:
        """The part of it that steps took which had been done before."""
        return self.working_s * self.num_repeated / self.num_steps if self.num_steps else 0.0


def ledger(records: Sequence[SegmentRecord]) -> Ledger:
    """The ledger of a run. Records in order of their numbers, as ``read_segments`` gives them."""
    every = list(lives(records))
    gaps = (after.begin_s - before.end_s for before, after in pairwise(every))
    recomputed_s = sum(life.recomputed_s for life in every)
    return Ledger(
        useful_s=sum(life.working_s for life in every) - recomputed_s,
        recomputed_s=recomputed_s,
        saving_s=sum(life.saving_s for life in every),
        starting_s=sum(life.starting_s for life in every[:1]),
        restarting_s=sum(life.starting_s for life in every[1:]),
        waiting_s=sum(max(0.0, gap) for gap in gaps),
        num_segments=len(every),
        num_recomputed_steps=sum(life.num_repeated for life in every),
    )


def lives(records: Iterable[SegmentRecord]) -> Iterable[Life]:
    """Each segment's life. Records in order of their numbers."""
    furthest = 0
    for record in records:
        costs_s = record.costs_s
        # The record is begun when the lease is taken, which is after the start of the process.
        begin_s = _unix_s(record.started_at) - costs_s.get("startup", 0.0)
        known_s = begin_s + sum(costs_s.values())
        end_s = max(begin_s, _unix_s(record.ended_at) if record.ended_at else known_s)
        num_repeated = max(0, min(record.end_step, furthest) - record.start_step)
        furthest = max(furthest, record.end_step)
        yield Life(
            begin_s=begin_s,
            end_s=end_s,
            starting_s=sum(costs_s.get(name, 0.0) for name in STARTING),
            saving_s=costs_s.get("saving", 0.0),
            num_steps=record.end_step - record.start_step,
            num_repeated=num_repeated,
        )


def _unix_s(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _row(name: str, seconds: float, total_s: float) -> str:
    share = seconds / total_s if total_s > 0 else 0.0
    return f"{name:<12}{seconds:10.1f} s {share:7.1%}"
