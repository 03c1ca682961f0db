"""Saving and restoring 400 MB of state, against the least that the machine needs for it.

- time that a save takes from the training loop, against one copy of the bytes in memory;
- time to durable, against writing the same bytes with one write per tensor and one flush;
- restore, against reading them (from the page cache, into memory as fresh as ours).

Beside them ``torch.save`` and ``torch.distributed.checkpoint``, sync and async, which neither
flush nor verify; DCP's async time from the loop is its staging copy.

    python benchmarks/checkpoint.py [--folder F] [--megabytes N] [--repetitions N]
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed.checkpoint as dcp
from interleaving import markdown_table, median_ratio, timed
from torch import Tensor

from holdfast.training.checkpointing.manager import (
    CheckpointContents,
    CheckpointIdentity,
    CheckpointManager,
)
from holdfast.training.checkpointing.policy import KeepLast
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory

Tensors = dict[str, dict[str, Tensor]]
Timings = dict[str, list[float]]
TENSOR_BYTES = 4 * 2**20
NUM_WARM_UP = 3  # a virtual disk is slow where it was never written before


def make_state(num_bytes: int) -> Tensors:
    """A model, two moments per weight and an average, in fp32 tensors of 4 MiB."""
    num = math.ceil(num_bytes / TENSOR_BYTES / 4)
    shares = {"model": 1, "optimizer": 2, "ema": 1}
    return {
        stem: {
            f"layer-{i:03d}": torch.randn(1024, TENSOR_BYTES // 4096) for i in range(share * num)
        }
        for stem, share in shares.items()
    }


def flat(state: Tensors) -> dict[str, Tensor]:
    return {f"{stem}.{name}": t for stem, inner in state.items() for name, t in inner.items()}


class Rivals:
    """Each case returns the seconds it took by what they went to."""

    def __init__(self, folder: Path, state: Tensors, manager: CheckpointManager) -> None:
        self._folder = folder
        self._state = state
        self._flat = flat(state)
        self._copies = {name: torch.zeros_like(tensor) for name, tensor in self._flat.items()}
        self._manager = manager
        self._step = 0

    def copy(self) -> dict[str, float]:
        """One copy of the bytes into memory that is there already."""
        with timed() as copied:
            for name, tensor in self._flat.items():
                self._copies[name].copy_(tensor)
        return {"loop": copied()}

    def bare(self) -> dict[str, float]:
        """One file, one write per tensor, one flush; then read into fresh memory."""
        path = self._folder / "bare"
        views = [tensor.view(-1).numpy().data.cast("B") for tensor in self._flat.values()]
        with timed() as written:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            for view in views:
                os.write(descriptor, view)
            os.fsync(descriptor)
            os.close(descriptor)
        with timed() as read, path.open("rb", buffering=0) as file:
            # Too large for what was freed before to be used again: a process that resumes has
            # no such memory either.
            fresh = torch.empty(sum(map(len, views)), dtype=torch.uint8).numpy().data
            end = 0
            for view in views:
                end += file.readinto(fresh[end : end + len(view)])
        path.unlink()
        return {"durable": written(), "restore": read()}

    def holdfast(self) -> dict[str, float]:
        """Save, wait until it is durable, verified and published; restore, verified."""
        self._step += 1
        contents = CheckpointContents(self._step, 0, "steps", {}, self._state, {})
        start_s = time.perf_counter()
        with timed() as taken:
            self._manager.save(contents)
        self._manager.wait()
        waited_s = time.perf_counter() - start_s
        published = self._manager.poll()
        assert published is not None
        with timed() as restored:
            found = self._manager.restore()
        assert found is not None
        assert found.manifest.step == self._step
        return {
            "loop": taken(),
            "durable": published.durable_s,
            "restore": restored(),
            "prune": waited_s - published.durable_s,
        }

    def torch_save(self) -> dict[str, float]:
        """Pickle in a zip file; no flush."""
        path = self._folder / "torch.pt"
        with timed() as saved:
            torch.save(self._flat, path)
        with timed() as loaded:
            torch.load(path, weights_only=True)
        path.unlink()
        return {"loop": saved(), "restore": loaded()}

    def dcp_sync(self) -> dict[str, float]:
        """torch.distributed.checkpoint.save in one process."""
        path = self._folder / "dcp"
        with timed() as saved:
            dcp.save(self._flat, checkpoint_id=path, no_dist=True)
        with timed() as loaded:
            dcp.load(self._copies, checkpoint_id=path, no_dist=True)
        shutil.rmtree(path)
        return {"loop": saved(), "restore": loaded()}

    def dcp_async(self) -> dict[str, float]:
        """torch.distributed.checkpoint.async_save in one process."""
        path = self._folder / "dcp-async"
        with timed() as saved:
            future = dcp.async_save(self._flat, checkpoint_id=path, no_dist=True)
        future.result()  # type: ignore[union-attr]
        shutil.rmtree(path)
        return {"loop": saved()}

    def cases(self) -> dict[str, Callable[[], dict[str, float]]]:
        """All of them by the name they have in the table."""
        return {
            "memory copy": self.copy,
            "bare write, flush, read": self.bare,
            "Holdfast": self.holdfast,
            "torch.save": self.torch_save,
            "DCP": self.dcp_sync,
            "DCP async": self.dcp_async,
        }


def measure(rivals: Rivals, repetitions: int) -> dict[str, Timings]:
    """Interleaved, so that drift hits all alike; the first rounds do not count."""
    timings: dict[str, Timings] = {name: {} for name in rivals.cases()}
    order = random.Random(0)  # each finds what the one before it left in memory and on the disk
    for repetition in range(-NUM_WARM_UP, repetitions):
        for name, case in order.sample(list(rivals.cases().items()), len(timings)):
            os.sync()  # what the last one left unflushed is not to slow down the next
            for kind, seconds in case().items():
                if repetition >= 0:
                    timings[name].setdefault(kind, []).append(seconds)
    return timings


def report(timings: dict[str, Timings]) -> str:
    """The table, and our three ratios."""
    references = {"loop": "memory copy", "durable": "bare write, flush, read"}
    references["restore"] = references["durable"]

    def cell(name: str, kind: str) -> str:
        if kind not in timings[name]:
            return ""
        ratio = median_ratio(timings[name][kind], timings[references[kind]][kind])
        return f"{median(timings[name][kind]) * 1e3:.0f} ms ({ratio:.2f})"

    header = ["", "from the loop", "to durable", "restore"]
    rows = [[name, *(cell(name, kind) for kind in references)] for name in timings]
    ratios = (
        f"Holdfast / reference, {kind}: "
        f"{median_ratio(timings['Holdfast'][kind], timings[reference][kind]):.2f} (aim 1.30)"
        for kind, reference in references.items()
    )
    prune_s = median(timings["Holdfast"]["prune"])
    pruning = f"Deleting the checkpoint before, after that: {prune_s * 1e3:.0f} ms."
    return "\n".join([markdown_table(header, rows), "", pruning, *ratios])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    state = make_state(arguments.megabytes * 10**6)
    num_bytes = sum(tensor.nbytes for tensor in flat(state).values())
    identity = CheckpointIdentity("benchmark", {}, "cpu", 1)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=arguments.folder) as name:
        run = RunDirectory(Path(name) / "benchmark" / "run")
        with Lease.acquire(run, 60.0) as lease:
            manager = CheckpointManager(run, lease, identity, (KeepLast(1),))
            timings = measure(Rivals(Path(name), state, manager), arguments.repetitions)
    print(
        f"{num_bytes / 1e6:.0f} MB in {len(flat(state))} tensors, {torch.get_num_threads()} "
        f"threads, {arguments.repetitions} repetitions; medians, in brackets the ratio\n"
    )
    print(report(timings))


if __name__ == "__main__":
    main()
