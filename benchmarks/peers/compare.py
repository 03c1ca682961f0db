"""Which training that was stopped twice ends with the bytes of one that was not.

Six rivals train the same digits: dropout, batch norm, items that draw their augmentation. Each is
stopped twice at seeded steps, by SIGTERM or SIGKILL, with 0 or 2 loader processes, and started
again as its documentation says; then the weights are compared with those of a calm run.

    python benchmarks/peers/compare.py [--seeds 4] [--rival NAME]... [--at-once 2]

Needs transformers, accelerate and lightning. This process imports everything, and forks for each
life of a run: a process of its own, with its own session, that is killed as any other.
"""

from __future__ import annotations

import argparse
import atexit
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from holdfast.training.exactness.reproducibility import child_environment, is_environment_set

HERE = Path(__file__).parent
RIVALS = {
    "a loop with `holdfast.run`": "loop_holdfast",
    "Transformers' Trainer with Holdfast": "transformers_holdfast",
    "Lightning with Holdfast": "lightning_holdfast",
    "Transformers' Trainer alone": "transformers_alone",
    "Lightning alone": "lightning_alone",
    "Accelerate alone": "accelerate_alone",
}
VARIANTS = [(workers, name) for workers in (0, 2) for name in ("SIGTERM", "SIGKILL")]
IMPORTED = (
    "accelerate",
    "lightning.pytorch",
    "sklearn.datasets",
    "torch._dynamo",
    "transformers.trainer",
    "holdfast.integrations.lightning",
    "holdfast.integrations.transformers",
)
LIFE_LIMIT_S = 120
Life = tuple[str, tuple[str, ...], Path]
"""Rival, arguments, folder."""


@dataclass
class Outcomes:
    """What became of the runs of one rival, by variant."""

    found: dict[tuple[int, str], Counter[str]] = field(default_factory=dict)

    def add(self, variant: tuple[int, str], outcome: str) -> None:
        """Count a run."""
        self.found.setdefault(variant, Counter())[outcome] += 1

    def total(self) -> Counter[str]:
        """Of all variants."""
        return sum(self.found.values(), Counter())


def stops(workers: int, signal_name: str, seed: int) -> list[str]:
    """After how many steps of its first two lives a run is stopped; the same for all rivals."""
    draws = random.Random(f"{workers}/{signal_name}/{seed}")
    return [f"{signal_name}:{draws.randint(8, 32)}" for _ in range(2)]


def trained(
    rival: str, seed: int, workers: int, folder: Path, outcomes: Outcomes, at: Sequence[str]
) -> Generator[Life, int, None]:
    """Calm and stopped runs of one seed: asks for lives, and is told their exit codes.

    Raises RuntimeError where two calm runs differ: then nothing can be said of a stopped one.
    """
    words = ("--seed", str(seed), "--workers", str(workers))
    calm, again = folder / "calm", folder / "calm again"
    for each in (calm, again):
        code = yield rival, words, each
        if code or not (each / "weights.txt").exists():
            raise RuntimeError(f"{rival} did not train: {(each / 'log.txt').read_text()[-2000:]}")
    expected = calm / "weights.txt"
    if expected.read_text() != (again / "weights.txt").read_text():
        raise RuntimeError(f"{rival}: two calm runs of seed {seed} differ")
    for name in at:
        stopped = folder / name
        for stop in stops(workers, name, seed):
            yield rival, (*words, "--stop", stop), stopped
        yield rival, words, stopped
        found = stopped / "weights.txt"
        is_there = found.exists()
        is_same = is_there and found.read_text() == expected.read_text()
        outcomes.add((workers, name), "exact" if is_same else "other" if is_there else "stuck")


def started(life: Life) -> int:
    """The process id of a life."""
    rival, words, folder = life
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _live(HERE / f"{rival}.py", words, folder)
    return pid


def _live(script: Path, words: Sequence[str], folder: Path) -> None:
    os.setsid()
    signal.alarm(LIFE_LIMIT_S)
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [str(script), *words]
    code: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as left:
        code = left.code
    except BaseException:  # noqa: BLE001  # as the interpreter does
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def run_all(cases: list[Generator[Life, int, None]], num_at_once: int) -> None:
    """Run every case to its end, some at once."""
    waiting, active = list(reversed(cases)), {}
    while waiting or active:
        while waiting and len(active) < num_at_once:
            case = waiting.pop()
            active[started(next(case))] = case
        pid, status = os.wait()
        case = active.pop(pid)
        try:
            active[started(case.send(os.waitstatus_to_exitcode(status)))] = case
        except StopIteration:
            continue


def table(outcomes: dict[str, Outcomes]) -> str:
    """Exact runs of each rival, by variant and in all; and those that could not go on."""
    named = [f"{name}, {workers} workers" for workers, name in VARIANTS]
    lines = [
        f"| {' | '.join(['', *named, 'exact', 'could not go on'])} |",
        f"| {' | '.join(['---', *['---:'] * (len(named) + 2)])} |",
    ]
    for rival, found in outcomes.items():
        cells = []
        for variant in VARIANTS:
            counts = found.found.get(variant, Counter())
            cells.append(f"{counts['exact']} of {counts.total()}")
        total = found.total()
        shown = f"**{total['exact']} of {total.total()}**"
        lines.append(f"| {' | '.join([rival, *cells, shown, str(total['stuck'])])} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table. Returns 1 where a run that Holdfast kept was not exact."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rival", action="append", choices=sorted(RIVALS.values()))
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="the first so many")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="leave everything there")
    arguments = parser.parse_args()
    if not is_environment_set(1):
        os.execve(sys.executable, [sys.executable, *sys.argv], child_environment(1))
    sys.path.insert(0, str(HERE))
    for name in IMPORTED:
        import_module(name)
    chosen = {k: v for k, v in RIVALS.items() if v in (arguments.rival or RIVALS.values())}
    outcomes = {name: Outcomes() for name in chosen}
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="peers-"))
    variants = VARIANTS[: arguments.variants]
    cases = [
        trained(
            script,
            seed,
            workers,
            folder / script / f"{workers}-{seed}",
            outcomes[name],
            [name for num, name in variants if num == workers],
        )
        for name, script in chosen.items()
        for seed in range(arguments.seeds)
        for workers in sorted({workers for workers, _ in variants})
    ]
    run_all(cases, arguments.at_once)
    versions = ", ".join(f"{p} {version(p)}" for p in ("transformers", "lightning", "accelerate"))
    print(f"{table(outcomes)}\n\nWith {versions}.")
    if arguments.folder is None:
        shutil.rmtree(folder)
    ours = [o for name, o in outcomes.items() if "holdfast" in chosen[name]]
    return int(any(o.total()["exact"] != o.total().total() for o in ours))


if __name__ == "__main__":
    sys.exit(main())
