"""Machines that come and go: out of a preemption trace, or with exponential lives."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Protocol

from holdfast.training.configuration.errors import nearest
from holdfast.training.errors import DataFormatError, DataNotFoundError, InputError

UNITS = {"milliseconds": 1e-3, "seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
EVENTS = ("add", "remove")
MAX_AT_S = 1e10  # three hundred years
MAX_RESOLUTION_S = 60.0


@dataclass(frozen=True)
class Machine:
    """One machine's life.

    Attributes:
        begin_s: when it is there.
        end_s: when it is gone; infinite where nobody saw it go.
        notice_s: how long before its end it is told; 0 for not at all.
    """

    begin_s: float
    end_s: float
    notice_s: float = 0.0


class Capacity(Protocol):
    """Where the next machine comes from."""

    def next_machine(self, at_s: float) -> Machine:
        """The machine that takes the run up, which is without one from ``at_s`` on.

        It may begin later; one that was there before is there still.
        """
        ...


@dataclass(frozen=True)
class Trace:
    """What was seen of a group of machines, from 0 to ``length_s``; by when they came.

    Attributes:
        resolution_s: of which all times are multiples, a minute at most; 0 where there is none.
    """

    machines: tuple[Machine, ...]
    length_s: float
    resolution_s: float = 0.0

    @property
    def num_gone(self) -> int:
        """Machines that were seen to go."""
        return sum(math.isfinite(machine.end_s) for machine in self.machines)

    @property
    def median_life_s(self) -> float:
        """Of those that were seen to go; infinite where none was."""
        seen = [m.end_s - m.begin_s for m in self.machines if math.isfinite(m.end_s)]
        return median(seen) if seen else math.inf

    def with_notices(self, notice_s: float, share_without: float, seed: int) -> Trace:
        """The same, in which all machines but a share, drawn from the seed, are told before."""
        chance = random.Random(seed)
        machines = (
            replace(one, notice_s=notice_s if chance.random() >= share_without else 0.0)
            for one in self.machines
        )
        return replace(self, machines=tuple(machines))

    def spread(self, seed: int) -> Trace:
        """The same, each time drawn from the resolution's length of time that ends with it.

        Who looked once a minute saw at the full minute what had happened since the last one. Taken
        by the word, an interval between saves that divides a minute would look better than it is.
        """
        chance, width_s = random.Random(seed), self.resolution_s
        machines = []
        for one in self.machines:
            begin_s = one.begin_s - (width_s * chance.random() if one.begin_s else 0.0)
            end_s = max(begin_s, one.end_s - width_s * chance.random())
            machines.append(replace(one, begin_s=begin_s, end_s=end_s))
        return replace(self, machines=tuple(sorted(machines, key=_order)))

    def compressed(self, factor: float) -> Trace:
        """The same in a fraction of the time."""
        machines = (
            replace(one, begin_s=one.begin_s / factor, end_s=one.end_s / factor)
            for one in self.machines
        )
        return Trace(tuple(machines), self.length_s / factor, self.resolution_s / factor)


def read_trace(path: Path) -> Trace:
    """The trace in a CSV file: rows of time, ``add`` or ``remove``, and the machine's name.

    Times are milliseconds, or what a first row says: ``seconds,event,machine`` has seconds. What
    was seen last is where the trace ends; whoever is there then was not seen to go.

    Raises:
        DataNotFoundError: there is no such file.
        DataFormatError: names the line that is wrong: a time that runs backwards or is one of a
            clock, a machine that comes twice or goes without having come; or no machine is in the
            trace at all.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return _parsed(csv.reader(file), str(path))
    except FileNotFoundError as error:
        raise DataNotFoundError(f"there is no trace {path}: name a CSV file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(f"the trace {path} cannot be read: {error}") from error


def _parsed(rows: Iterable[Sequence[str]], path: str) -> Trace:
    there: dict[str, float] = {}
    machines: list[Machine] = []
    last_s = 0.0
    first: tuple[str, float] | None = None
    for place, at_s, event, name in _events(rows, path):
        first = first or (place, at_s)
        if at_s < last_s:
            raise DataFormatError(
                f"{place}: the trace runs backwards, from {last_s:g} s to {at_s:g} s: sort its rows"
            )
        last_s = at_s
        if event == "add" and name not in there:
            there[name] = at_s
        elif event == "remove" and name in there:
            machines.append(Machine(there.pop(name), at_s))
        else:
            problem = "comes and is there already" if event == "add" else "goes and was not there"
            raise DataFormatError(f"{place}: the machine {name!r} {problem}")
    machines += [Machine(begin_s, math.inf) for begin_s in there.values()]
    if first is None:
        raise DataFormatError(
            f"the trace {path} is empty: expected rows such as 60000,add,node1 (milliseconds)"
        )
    place, first_s = first
    if first_s > last_s / 2:
        raise DataFormatError(
            f"{place}: nobody is there for the first {first_s:g} s of {last_s:g} s, as if these "
            f"were times of a clock: take the time of its first row from all"
        )
    if all(machine.end_s == machine.begin_s for machine in machines):
        raise DataFormatError(f"in the trace {path} every machine goes when it comes")
    return Trace(tuple(sorted(machines, key=_order)), last_s, _resolution_s(machines))


def _order(machine: Machine) -> tuple[float, float]:
    return machine.begin_s, machine.end_s


def _resolution_s(machines: Sequence[Machine]) -> float:
    times = [at_s for one in machines for at_s in (one.begin_s, one.end_s) if at_s < math.inf]
    milliseconds = math.gcd(*(round(1000 * at_s) for at_s in times))
    return min(milliseconds / 1000, MAX_RESOLUTION_S)


def _events(rows: Iterable[Sequence[str]], path: str) -> Iterator[tuple[str, float, str, str]]:
    """Place, seconds, event and machine of each row."""
    scale = UNITS["milliseconds"]
    for line, row in enumerate(rows, 1):
        place, fields = f"{path}, line {line}", [field.strip() for field in row]
        if not any(fields):
            continue
        if line == 1 and len(fields) == 3 and fields[1] == "event":
            if fields[0] not in UNITS:
                raise DataFormatError(
                    f"{place}: {fields[0][:30]!r} is no unit of times; {nearest(fields[0], UNITS)}"
                )
            scale = UNITS[fields[0]]
            continue
        if len(fields) != 3 or not fields[2] or fields[1] not in EVENTS:
            raise DataFormatError(
                f"{place} is {','.join(row)[:60]!r}: expected a time, add or remove, and a machine"
            )
        yield place, _time_s(fields[0], scale, place), fields[1], fields[2]


def _time_s(text: str, scale: float, place: str) -> float:
    try:
        at_s = float(text) * scale
    except ValueError:
        at_s = math.nan
    if not 0 <= at_s <= MAX_AT_S:
        raise DataFormatError(f"{place}: the time {text[:30]!r} is no number of at least 0")
    return at_s


class TraceCapacity:
    """A run that begins somewhere in a trace, which repeats itself.

    It takes the machine that has been there longest, and none that was told of its end already.
    What was there at the end of the trace goes with it.
    """

    def __init__(self, trace: Trace, start_s: float) -> None:
        """Raises InputError where no machine lives longer than its notice."""
        self._trace = trace
        self._start_s = start_s
        can_take_up = any(self._can_take_up(machine, 0.0) for machine in trace.machines)
        if trace.num_gone and not can_take_up:
            longest_s = max(machine.notice_s for machine in trace.machines)
            raise InputError(
                f"no machine of the trace lives longer than its notice of {longest_s:g} s: name a "
                f"shorter one"
            )

    def next_machine(self, at_s: float) -> Machine:
        """As ``Capacity``."""
        if not self._trace.num_gone:
            first = self._trace.machines[0]  # nobody was seen to go: it is there for good
            return replace(first, begin_s=max(0.0, first.begin_s - self._start_s))
        length_s = self._trace.length_s
        number, within_s = divmod(self._start_s + at_s, length_s)
        here = [one for one in self._trace.machines if self._can_take_up(one, within_s)]
        number += not here
        found = here[0] if here else self._first_of_next_pass()
        offset_s = number * length_s - self._start_s
        return replace(
            found,
            begin_s=found.begin_s + offset_s,
            end_s=min(found.end_s, length_s) + offset_s,
        )

    def _first_of_next_pass(self) -> Machine:
        return next(one for one in self._trace.machines if self._can_take_up(one, 0.0))

    def _can_take_up(self, machine: Machine, at_s: float) -> bool:
        """Whether it lives, or will, and is not going at that time."""
        last_s = min(machine.end_s, self._trace.length_s) - machine.notice_s
        return last_s > max(at_s, machine.begin_s)


class ExponentialCapacity:
    """There is always a machine; how long it lives is drawn anew each time."""

    def __init__(
        self, mean_s: float, notice_s: float, share_without_notice: float, seed: str
    ) -> None:
        """``mean_s`` is the mean life. The same seed draws the same lives, one after the other."""
        assert mean_s > 0
        self._mean_s = mean_s
        self._notice_s = notice_s
        self._share_without_notice = share_without_notice
        self._chance = random.Random(seed)

    def next_machine(self, at_s: float) -> Machine:
        """As ``Capacity``."""
        life_s = self._chance.expovariate(1 / self._mean_s)
        is_told = self._chance.random() >= self._share_without_notice
        # One that goes at once was told before it was taken up.
        return Machine(at_s, at_s + life_s, min(self._notice_s, life_s) if is_told else 0.0)
