"""On one GPU, in ten minutes: what a save, deterministic mode and a restore cost a GPT-2.

    python benchmarks/on_gpu.py            124 M parameters, bf16, batch 16 x 1024
    python benchmarks/on_gpu.py --tiny     does it run? on whatever there is; figures mean nothing
    python benchmarks/on_gpu.py --set checkpoint.should_overlap=false         copies in the loop

- The first save and later ones, from the loop: by how much steps with one save take longer than as
  many without. Against a step, and against the bus alone.
- A step in speed mode, in deterministic mode, and in that without the fills of fresh memory, which
  only serve to find reads of memory that nobody has written.
- A restore against reading the bytes, and the first step after it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.interleaving import markdown_table
from holdfast.training.checkpointing.manager import CheckpointManager
from holdfast.training.exactness.reproducibility import set_up_torch
from holdfast.training.loop.saving import Saver
from holdfast.training.loop.segment import build_manager, build_saver, build_trainer, restore
from holdfast.training.loop.state import TrainState
from holdfast.training.loop.state_validation import validate_state
from holdfast.training.loop.trainer import Trainer
from holdfast.training.runs.costs import Costs
from holdfast.training.stage import Stage, StageArguments, prepared_stage

EXPERIMENT = f"{Path(__file__).with_name('gpt.py')}:Task"
TINY = (
    *("experiment.layers=2", "experiment.width=64", "experiment.context=16"),
    *("experiment.vocabulary=64", "data.batch_size=4", "optimizer.args.fused=false"),
)
NUM_SAVES = 4
NUM_THREADS = 4


class Measured:
    """One run's parts, and what is timed of them."""

    def __init__(self, stage: Stage, trainer: Trainer, saver: Saver, steps: int) -> None:
        self.stage, self.trainer, self.saver, self.num_steps = stage, trainer, saver, steps
        self._steps = trainer.steps()

    def step(self) -> None:
        """As the loop does one."""
        assert not self.stage.should_stop()
        self.trainer.train_step(next(self._steps))
        self.saver.after_step()

    def step_ms(self, repetitions: int = 5) -> float:
        """The median over repetitions of so many steps, after one that does not count."""
        times = [timed_ms(self._some) / self.num_steps for _ in range(repetitions + 1)]
        return median(times[1:])

    def save_ms(self) -> float:
        """What a save takes from the loop: so many steps after it, minus as many without one."""
        plain_ms = min(timed_ms(self._some) for _ in range(2))
        return timed_ms(self._save_and_some) - plain_ms

    def bus_ms(self) -> float:
        """The same bytes to pinned memory, and nothing else."""
        tensors, _ = self.trainer.state.capture()
        live = [tensor for inner in tensors.values() for tensor in inner.values()]
        pinned = [host_like(tensor) for tensor in live]

        def copy() -> None:
            for target, tensor in zip(pinned, live, strict=True):
                target.copy_(tensor, non_blocking=True)

        return min(timed_ms(copy) for _ in range(NUM_SAVES))

    def _save_and_some(self) -> None:
        self.saver._save("steps", {})
        self._some()

    def _some(self) -> None:
        for _ in range(self.num_steps):
            self.step()


def timed_ms(function: Callable[[], object]) -> float:
    """With the device's queue empty before and after."""
    wait()
    start_s = time.perf_counter()
    function()
    wait()
    return 1e3 * (time.perf_counter() - start_s)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def modes(measured: Measured) -> list[list[str]]:
    """Steps in each mode, one after the other, twice; the faster round counts."""
    fills = torch.utils.deterministic
    found: dict[str, list[float]] = {}
    for _ in range(2):
        for name, mode, should_fill in (
            ("speed", "speed", True),
            ("deterministic", "deterministic", True),
            ("deterministic, fresh memory not filled", "deterministic", False),
        ):
            set_up_torch(mode, NUM_THREADS)  # type: ignore[arg-type]
            fills.fill_uninitialized_memory = should_fill
            found.setdefault(name, []).append(measured.step_ms())
    fills.fill_uninitialized_memory = True
    least = min(found["speed"])
    return [[name, f"{min(ms):.2f}", f"{min(ms) / least:.3f}"] for name, ms in found.items()]


def saves(measured: Measured, manager: CheckpointManager) -> list[list[str]]:
    """The first save is prepared as the loop prepares it."""
    measured.step()
    measured.saver.prepare()
    measured.step()
    step_ms, stalls, durable_s = measured.step_ms(), [], []
    for _ in range(NUM_SAVES):
        stalls.append(measured.save_ms())
        measured.saver.finish()
        assert manager.durable_s is not None
        durable_s.append(manager.durable_s)
        measured.step()
    return [
        ["a step", f"{step_ms:.1f}"],
        ["the first save, from the loop", f"{stalls[0]:.1f}"],
        ["later ones, median", f"{median(stalls[1:]):.1f}"],
        ["the bus alone", f"{measured.bus_ms():.1f}"],
        ["durable after", f"{1e3 * median(durable_s):.0f}"],
    ]


def restores(measured: Measured, manager: CheckpointManager) -> list[list[str]]:
    """The newest checkpoint, from the page cache; straight to the GPU, and through memory."""
    run, state = measured.stage.run, measured.trainer.state
    newest = sorted(run.checkpoints.iterdir())[-1]

    def read() -> None:
        for path in newest.iterdir():
            path.read_bytes()

    def straight() -> None:
        restore(measured.stage, manager, state)

    def through_memory() -> None:
        restored = manager.restore(validate=validate_state)
        assert restored is not None
        state.restore(restored.tensors, restored.state)

    ways: dict[str, Callable[[], None]] = {
        "reading its bytes": read,
        "restore, through memory": through_memory,
        "restore": straight,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            times[name].append(timed_ms(way))
    through_memory()
    expected = copied(state)
    straight()
    assert all(torch.equal(found, expected[name]) for name, found in copied(state).items())
    measured._steps = measured.trainer.steps()
    first_ms, second_ms = timed_ms(measured.step), timed_ms(measured.step)
    return [
        *([name, f"{min(found):.0f}"] for name, found in times.items()),
        ["the first step after it", f"{first_ms:.1f}"],
        ["the second", f"{second_ms:.1f}"],
    ]


def copied(state: TrainState) -> dict[str, Tensor]:
    """The bytes of all that a checkpoint holds, in memory."""
    tensors, _ = state.capture()
    return {
        f"{stem}.{name}": tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).clone()
        for stem, inner in tensors.items()
        for name, tensor in inner.items()
    }


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"{title}\n\n{markdown_table(header, rows)}\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=20, help="of one repetition")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.error("torch finds no GPU here; --tiny shows that the program runs")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{device}, torch {torch.__version__}\n")
    tiny = TINY if arguments.tiny else ()
    with tempfile.TemporaryDirectory() as store:
        stage_arguments = StageArguments(
            experiment=EXPERIMENT,
            store=Path(store),
            run_id="gpu",
            num_threads=NUM_THREADS,
            overrides=(*tiny, "checkpoint.is_auto=false", *arguments.overrides),
            progress_format="none",
        )
        with prepared_stage(stage_arguments) as stage, stage.writing() as lease:
            trainer = build_trainer(stage, Costs())
            manager = build_manager(stage, trainer, lease, segment=1)
            saver = build_saver(stage, trainer, manager)
            measured = Measured(stage, trainer, saver, arguments.steps)
            show("A save", ["", "ms"], saves(measured, manager))
            show("A restore", ["", "ms"], restores(measured, manager))
            show("A step", ["mode", "ms", "of speed mode"], modes(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
