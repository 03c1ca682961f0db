"""Steps per second of a script in the hands of ``holdfast.run``, against the script without it.

Both scripts of docs/own_loop.md run as they are, in two threads of one process that take turns
after each validation: a turn has everything that a script does, its saves included.

    python benchmarks/own_loop_speed.py [--turns N]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import runpy
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
from interleaving import markdown_table, median_ratio
from torch.optim.optimizer import register_optimizer_step_post_hook

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "own_loop"
STEPS_OF_A_TURN = 100  # from validation to validation


class Turns:
    """Lets one of two threads run at a time, for so many steps of its optimizer."""

    def __init__(self, names: tuple[str, str]) -> None:
        self._gates = {name: threading.Semaphore(0) for name in names}
        self._steps = dict.fromkeys(names, 0)
        self._start_s, self._is_one_over = 0.0, False
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._gates[names[0]].release()
        register_optimizer_step_post_hook(lambda *_: self._after_step())

    def begin(self) -> None:
        """Wait for the turn of this thread."""
        self._gates[self._name].acquire()
        self._start_s = time.perf_counter()

    def end(self) -> None:
        """This thread's script is over; the other one is not waited for any more."""
        self._is_one_over = True
        self._other.release()

    def _after_step(self) -> None:
        name = self._name
        self._steps[name] += 1
        if self._steps[name] % STEPS_OF_A_TURN == 0:
            self.seconds[name].append(time.perf_counter() - self._start_s)
            if not self._is_one_over:
                self._other.release()
                self.begin()

    @property
    def _name(self) -> str:
        return threading.current_thread().name

    @property
    def _other(self) -> threading.Semaphore:
        [other] = [gate for name, gate in self._gates.items() if name != self._name]
        return other


def train(name: str, turns: Turns) -> None:
    """Run a script in this thread."""
    turns.begin()
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        turns.end()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--turns", type=int, default=41)
    num_turns = parser.parse_args().turns
    torch.set_num_threads(1)
    threading.current_thread().name = "kept"  # signals are for the main thread
    turns = Turns(("plain", "kept"))
    sys.argv = ["gpt", "--steps", str(num_turns * STEPS_OF_A_TURN)]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["HOLDFAST_STORE"] = folder
        os.environ["OMP_NUM_THREADS"] = "1"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            plain = threading.Thread(target=train, args=("plain", turns), name="plain")
            plain.start()
            train("kept", turns)
            plain.join()
    times = {name: seconds[1:] for name, seconds in turns.seconds.items()}  # one to warm up
    rates = [f"{STEPS_OF_A_TURN / median(times[name]):.1f}" for name in times]
    ratio = f"{median_ratio(times['plain'], times['kept']):.3f}"
    header = ["script", "plain, steps/s", "with `holdfast.run`, steps/s", "kept / plain"]
    print(markdown_table(header, [["a small GPT", *rates, ratio]]))


if __name__ == "__main__":
    main()
