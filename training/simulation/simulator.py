"""One run on machines that come and go, reckoned without training it.

Work is a number of seconds; a life does some of it, pays for its saves, and keeps what was durable
when it ended. What is made of it is the same ledger that a run's records make.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from holdfast.training.checkpointing.policy import SaveSchedule, estimated_mean_time_s
from holdfast.training.preemption.notices import SAVE_MARGIN
from holdfast.training.runs.ledger import Ledger
from holdfast.training.simulation.capacity import Capacity, Machine
from holdfast.training.simulation.costs import RunCosts

MAX_IDLE_LIVES = 300
"""Lives in a row that keep nothing, after which a run never ends."""


@dataclass(frozen=True)
class Intervals:
    """Seconds of work between two saves that are due to the time: to the first one, and later."""

    first_s: float
    later_s: float


Saving = Callable[[float, int], Intervals]
"""What a segment saves by: (seconds lived so far, preemptions so far) -> intervals."""


def fixed(interval_s: float) -> Saving:
    """One interval for the whole run; infinite saves at ends of epochs alone."""
    return lambda _lived_s, _num_preempted: Intervals(interval_s, interval_s)


def online(schedule: SaveSchedule, costs: RunCosts, default_mean_s: float) -> Saving:
    """What training itself does: the interval of its schedule, from what it has lived so far."""

    def intervals(lived_s: float, num_preempted: int) -> Intervals:
        mean_s = estimated_mean_time_s(lived_s, num_preempted, default_mean_s)
        first_s = schedule.interval_s(None, mean_s)
        return Intervals(first_s, schedule.interval_s(costs.save_s, mean_s))

    return intervals


@dataclass(frozen=True)
class SaveTimes:
    """Which saves a life makes, and when: at its intervals, and at each end of an epoch.

    Attributes:
        costs: of the run.
        intervals: what is due to the time.
        start_s: seconds of work that were kept when the life began.
    """

    costs: RunCosts
    intervals: Intervals
    start_s: float

    def at(self, wall_s: float) -> tuple[float, float, float]:
        """After so many seconds of training: work that is done, the part of it that is in a save's
        copy, and the seconds that saves took. Durable it is later.
        """
        costs, done_s, saved_s, saving_s = self.costs, self.start_s, self.start_s, 0.0
        first_s = self._whole_steps(self.intervals.first_s)
        later_s = self._whole_steps(max(self.intervals.later_s, costs.durable_s))
        while done_s < costs.work_s:
            end_s = self._next_end_s(done_s)
            length_s = end_s - done_s
            part_saving_s = (_num_saves(length_s, first_s, later_s) + 1) * costs.save_s
            if wall_s < length_s + part_saving_s:
                work_s, kept_s = _part(wall_s, first_s, later_s, costs.save_s)
                work_s = min(work_s, length_s)
                saved_s = done_s + kept_s if kept_s else saved_s
                return done_s + work_s, saved_s, saving_s + wall_s - work_s
            num = 1.0
            if first_s == later_s and math.isclose(length_s, costs.epoch_s):
                # A whole epoch, and those after it are as this one.
                num_left = (costs.work_s - done_s) // length_s
                num = max(1.0, min(num_left, wall_s // (length_s + part_saving_s)))
            wall_s = max(0.0, wall_s - num * (length_s + part_saving_s))
            saving_s += num * part_saving_s
            done_s = saved_s = min(end_s + (num - 1) * costs.epoch_s, costs.work_s)
            first_s = later_s
        return done_s, saved_s, saving_s

    def _next_end_s(self, done_s: float) -> float:
        """Work that is done at the next end of an epoch, or of the run."""
        num_epochs = done_s / self.costs.epoch_s
        is_at_end = math.isclose(num_epochs, round(num_epochs), rel_tol=1e-9, abs_tol=1e-9)
        num_ended = round(num_epochs) if is_at_end else math.floor(num_epochs)
        return min((num_ended + 1) * self.costs.epoch_s, self.costs.work_s)

    def _whole_steps(self, interval_s: float) -> float:
        """Saves come after steps."""
        step_s = self.costs.step_s
        return interval_s if math.isinf(interval_s) else math.ceil(interval_s / step_s) * step_s


def _num_saves(length_s: float, first_s: float, later_s: float) -> int:
    """Saves that are due to the time before so much work is done."""
    if length_s <= first_s:
        return 0
    return math.ceil((length_s - first_s) / later_s) if math.isfinite(later_s) else 1


def _part(wall_s: float, first_s: float, later_s: float, save_s: float) -> tuple[float, float]:
    """Of some seconds of training: the work that was done, and the part of it that was saved."""
    if wall_s < first_s + save_s:
        return min(wall_s, first_s), 0.0
    rest_s, kept_s = wall_s - first_s - save_s, first_s
    if math.isfinite(later_s):
        num_later = rest_s // (later_s + save_s)
        rest_s -= num_later * (later_s + save_s)
        kept_s += num_later * later_s
    return kept_s + min(rest_s, later_s), kept_s


@dataclass(frozen=True)
class _Life:
    """What a segment did: seconds, and the work that the next one begins with."""

    lived_s: float
    starting_s: float
    saving_s: float
    worked_s: float
    kept_s: float
    pause_s: float
    is_last: bool = False


def simulate(costs: RunCosts, capacity: Capacity, saving: Saving) -> Ledger | None:
    """What the run's time goes to, from the moment when it is begun; None where it never ends."""
    at_s = ended_s = lived_s = waiting_s = furthest_s = kept_s = recomputed_s = 0.0
    lives: list[_Life] = []
    num_idle = 0
    while not lives or not lives[-1].is_last:
        if num_idle == MAX_IDLE_LIVES:
            return None
        machine = capacity.next_machine(at_s)
        begin_s = max(at_s, machine.begin_s)
        here = replace(machine, begin_s=0.0, end_s=machine.end_s - begin_s)
        life = _life(costs, here, kept_s, saving(lived_s, len(lives)))
        recomputed_s += max(0.0, min(kept_s + life.worked_s, furthest_s) - kept_s)
        furthest_s = max(furthest_s, kept_s + life.worked_s)
        num_idle = num_idle + 1 if life.kept_s == kept_s else 0
        waiting_s += begin_s - ended_s
        ended_s = begin_s + life.lived_s
        at_s, kept_s = ended_s + life.pause_s, life.kept_s
        lived_s += life.lived_s
        lives.append(life)
    starting = [life.starting_s for life in lives]
    saving_s = sum(life.saving_s for life in lives)
    return Ledger(
        useful_s=sum(life.worked_s for life in lives) - recomputed_s,
        recomputed_s=recomputed_s,
        saving_s=saving_s,
        starting_s=starting[0],
        restarting_s=sum(starting[1:]),
        waiting_s=waiting_s,
        num_segments=len(lives),
        num_recomputed_steps=round(recomputed_s / costs.step_s),
    )


def _life(costs: RunCosts, machine: Machine, kept_s: float, intervals: Intervals) -> _Life:
    """A segment that begins on a machine which ends after ``machine.end_s``."""
    told_s = machine.end_s - machine.notice_s
    training_s = told_s - costs.start_s
    pause_s = costs.handover_s if machine.notice_s else costs.takeover_s
    if training_s <= 0:
        lived_s = min(machine.end_s, max(told_s, costs.start_s))
        return _Life(lived_s, min(lived_s, costs.start_s), 0.0, 0.0, kept_s, pause_s)
    times = SaveTimes(costs, intervals, kept_s)
    done_s, _, saving_s = times.at(training_s)
    writing_s = costs.durable_s - costs.save_s  # what training does not wait for
    _, saved_s, _ = times.at(max(0.0, training_s - writing_s))
    if saved_s >= costs.work_s:
        saving_s += writing_s
    elif SAVE_MARGIN * costs.durable_s < machine.notice_s:
        saved_s, saving_s = done_s, saving_s + costs.durable_s
    return _Life(
        lived_s=costs.start_s + done_s - kept_s + saving_s,
        starting_s=costs.start_s,
        saving_s=saving_s,
        worked_s=done_s - kept_s,
        kept_s=saved_s,
        pause_s=pause_s,
        is_last=saved_s >= costs.work_s,
    )
