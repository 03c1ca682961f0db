"""Write small files in the format of NASA's C-MAPSS data, for tests and first tries.

``python -m holdfast.training.experiments.turbofan.synthetic FOLDER`` writes a subset that the
turbofan experiment trains on. The engines are invented: figures reached on them say nothing of
real ones.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from holdfast.training.experiments.turbofan.data import NUM_COLUMNS, SENSORS, Floats

NUM_SENSORS = 21
ONE_CONDITION = np.array([[0.0, 0.0, 100.0]])
SIX_CONDITIONS = np.array(
    [
        [0.0, 0.0, 100.0],
        [10.0, 0.25, 100.0],
        [20.0, 0.7, 100.0],
        [25.0, 0.62, 60.0],
        [35.0, 0.84, 100.0],
        [42.0, 0.84, 100.0],
    ]
)
SUBSETS = {
    "FD001": ONE_CONDITION,
    "FD002": SIX_CONDITIONS,
    "FD003": ONE_CONDITION,
    "FD004": SIX_CONDITIONS,
}


@dataclass(frozen=True)
class Fleet:
    """What is invented.

    Attributes:
        subset: FD001 and FD003 have one operating condition, FD002 and FD004 six.
        num_train: engines that run until they fail.
        num_test: engines that are cut off before.
        shortest_life: cycles, at least.
        longest_life: cycles, at most.
        seed: the same seed gives the same bytes.
    """

    subset: str = "FD001"
    num_train: int = 20
    num_test: int = 10
    shortest_life: int = 60
    longest_life: int = 160
    seed: int = 0


def write_fleet(folder: Path, fleet: Fleet) -> tuple[Path, Path, Path]:
    """Write train, test and RUL files into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(fleet.seed)
    # Sensors of one plant: its bases and slopes hold for training and test engines alike.
    base = 100 + 900 * random.random_sample((len(SUBSETS[fleet.subset]), NUM_SENSORS))
    slope = random.choice([-1.0, 1.0], NUM_SENSORS) * (1 + random.random_sample(NUM_SENSORS))
    varies = np.isin(np.arange(1, NUM_SENSORS + 1), SENSORS)

    def life() -> int:
        return int(random.randint(fleet.shortest_life, fleet.longest_life + 1))

    def history(unit: int, num_cycles: int) -> Floats:
        cycle = np.arange(1, num_cycles + 1)
        conditions = SUBSETS[fleet.subset]
        number = random.randint(0, len(conditions), num_cycles)
        settings = conditions[number] + random.randn(num_cycles, 3) * [0.002, 0.0002, 0.0]
        # Wear shows late: it grows exponentially towards the end of the life.
        wear = np.exp((cycle - num_cycles) / 40.0)[:, None]
        noise = 0.2 * random.randn(num_cycles, NUM_SENSORS)
        sensors = base[number] + varies * (slope * wear * 4 + noise)
        return np.column_stack([np.full(num_cycles, unit), cycle, settings, sensors])

    train = [history(unit, life()) for unit in range(1, fleet.num_train + 1)]
    whole = [history(unit, life()) for unit in range(1, fleet.num_test + 1)]
    # The first test engine is shorter than a window, as some of NASA's are.
    lengths = [
        19 if number == 0 else random.randint(25, len(rows) - 5)
        for number, rows in enumerate(whole)
    ]
    paths = tuple(folder / f"{kind}_{fleet.subset}.txt" for kind in ("train", "test", "RUL"))
    _write(paths[0], np.concatenate(train))
    _write(paths[1], np.concatenate([rows[:n] for rows, n in zip(whole, lengths, strict=True)]))
    remaining = [len(rows) - n for rows, n in zip(whole, lengths, strict=True)]
    paths[2].write_text("".join(f"{rul} \n" for rul in remaining), encoding="ascii")
    return paths[0], paths[1], paths[2]


def _write(path: Path, table: Floats) -> None:
    formats = ["%d", "%d", "%.4f", "%.4f", "%.1f"] + ["%.4f"] * NUM_SENSORS
    assert len(formats) == NUM_COLUMNS
    row = " ".join(formats)
    # NASA's rows end with two blanks.
    lines = [row % tuple(values) + "  \n" for values in table]
    path.write_text("".join(lines), encoding="ascii")


def main(arguments: list[str] | None = None) -> None:
    """Command line: write the files and name them."""
    default = Fleet()
    parser = argparse.ArgumentParser(prog="turbofan_synthetic", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subset", choices=sorted(SUBSETS), default=default.subset)
    parser.add_argument("--num-train", type=int, default=default.num_train)
    parser.add_argument("--num-test", type=int, default=default.num_test)
    parser.add_argument("--seed", type=int, default=default.seed)
    parsed = parser.parse_args(arguments)
    if parsed.num_train < 2 or parsed.num_test < 1:
        parser.error("at least 2 training engines and 1 test engine are needed")
    fleet = Fleet(parsed.subset, parsed.num_train, parsed.num_test, seed=parsed.seed)
    for path in write_fleet(parsed.folder, fleet):
        print(path)


if __name__ == "__main__":
    main()
