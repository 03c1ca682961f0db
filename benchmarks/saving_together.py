"""Saving and restoring weights that lie in slices on several processes.

- time that a save takes from the training loop, against a copy of each process's bytes in memory;
- time to durable, against writing them with one write per tensor and one flush a process;
- restore by another number of processes, against reading as many bytes as each of them keeps.

Beside them ``torch.distributed.checkpoint``, sync and async, with its default writer and with that
of safetensors, which neither publish at once nor verify. Each time is that of the slowest process.

    python benchmarks/saving_together.py [--folder F] [--megabytes N] [--processes N]
        [--restore-processes N] [--repetitions N]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from interleaving import markdown_table, median_ratio, timed
from ranks import is_rank, joined_world, run_in_ranks, slowest_s
from torch import Tensor, nn

from holdfast.training.checkpointing.finite import local_part
from holdfast.training.checkpointing.loading import load_checkpoint
from holdfast.training.checkpointing.manager import (
    CheckpointContents,
    CheckpointIdentity,
    CheckpointManager,
)
from holdfast.training.checkpointing.manifest import local_folder, manifest_of
from holdfast.training.checkpointing.policy import KeepLast
from holdfast.training.checkpointing.slices import WHOLE
from holdfast.training.configuration.schema import Section, Split
from holdfast.training.distributed.world import World
from holdfast.training.experiment.protocol import Batch, Context, Records
from holdfast.training.loop.segment import build_trainer
from holdfast.training.loop.state import TrainState
from holdfast.training.ranks.slice_files import OwnSlices, others_of_first
from holdfast.training.runs.costs import Costs
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.stage import StageArguments, prepared_stage

Timings = dict[str, dict[str, list[float]]]
Cases = Mapping[str, Callable[[], dict[str, float]]]
WIDTH = 1024  # a layer's weights are 4 MiB
BYTES_PER_LAYER = 4 * 4 * WIDTH * WIDTH  # with two moments and an average
NUM_WARM_UP = 2  # a virtual disk is slow where it was never written before
COPY, BARE = "memory copy", "bare write, flush, read"
DEFAULT, SAFETENSORS = "DCP", "DCP, safetensors"


class WideSettings(Section):
    """How much there is."""

    num_layers: int = 1


class Wide:
    """As many layers as asked for; a step of it is as small as can be."""

    defaults: ClassVar[dict[str, Any]] = {
        "data": {"batch_size": 8, "should_drop_last": True},
        "optimizer": {"name": "AdamW"},
        "ema": {"decays": [0.999]},
        "distributed": {"strategy": "fsdp"},
    }
    Settings = WideSettings

    def __init__(self, context: Context) -> None:
        self._num_layers = context.settings.num_layers

    def dataset(self, _: Split) -> Sequence[Tensor]:
        """Of one step."""
        return [torch.ones(WIDTH)] * 8

    def model(self) -> nn.Module:
        """A part for each layer."""
        layers = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self._num_layers))
        return Layers(layers)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of no meaning."""
        loss: Tensor = model(batch).square().mean()
        return loss

    def score(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The same of each row."""
        return {"loss": model(batch).square().mean(1)}

    def metrics(self, records: Records) -> dict[str, float]:
        """Their mean."""
        return {"loss": float(records["loss"].mean())}


class Layers(nn.Module):
    """One after the other."""

    def __init__(self, layers: Iterator[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, values: Tensor) -> Tensor:
        """Through all of them."""
        for layer in self.layers:
            values = layer(values)
        return values


class Rivals:
    """What a rank does for each case; returns the seconds it took by what they went to."""

    def __init__(self, folder: Path, world: World, state: TrainState) -> None:
        self._folder, self._world, self._state = folder, world, state
        self.tensors, self._values = state.capture()
        self._flat = {
            f"{stem}.{name}": tensor
            for stem, inner in self.tensors.items()
            for name, tensor in inner.items()
        }
        self._own = [local_part(tensor) for tensor in self._flat.values()]

    @property
    def num_bytes(self) -> int:
        """That this rank keeps."""
        return sum(tensor.nbytes for tensor in self._own)

    def copy(self) -> dict[str, float]:
        """One copy of this rank's bytes into memory that is there already."""
        with timed() as copied:
            for tensor, copy in zip(self._own, self._copies(), strict=True):
                copy.copy_(tensor)
        return {"loop": copied()}

    def bare_write(self) -> dict[str, float]:
        """A file a rank, one write per tensor, one flush."""
        path = self._folder / f"bare-{self._world.rank}"
        path.unlink(missing_ok=True)
        views = [tensor.contiguous().view(-1).view(torch.uint8).numpy() for tensor in self._own]
        with timed() as written:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            for view in views:
                os.write(descriptor, view.data)
            os.fsync(descriptor)
            os.close(descriptor)
        return {"durable": written()}

    def bare_read(self) -> dict[str, float]:
        """As many bytes as this rank keeps, into fresh memory, from the files that are there."""
        paths = sorted(self._folder.glob("bare-*"))
        parts = [part for part in _shares(paths, self._world) if part[2] > 0]
        with timed() as read:
            fresh = torch.empty(sum(num for _, _, num in parts), dtype=torch.uint8).numpy().data
            place = 0
            for path, start, num in parts:
                with path.open("rb", buffering=0) as file:
                    file.seek(start)
                    end = place + num
                    while place < end:
                        place += file.readinto(fresh[place:end])
        return {"restore": read()}

    def save_dcp(self, name: str, *, is_async: bool) -> dict[str, float]:
        """From the loop, and until all ranks have written."""
        path = self._folder / name
        if self._world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        self._world.gathered(None)  # begin together
        writer = _writer(name, path)
        with timed() as durable:
            with timed() as taken:
                if is_async:
                    future: Any = dcp.async_save(
                        self._flat, checkpoint_id=path, storage_writer=writer
                    )
                else:
                    dcp.save(self._flat, checkpoint_id=path, storage_writer=writer)
            if is_async:
                future.result()
        return {"loop": taken(), "durable": durable()}

    def load_dcp(self, name: str) -> dict[str, float]:
        """Into the tensors that are there."""
        path = self._folder / name
        reader = None
        if name.startswith(SAFETENSORS):
            reader = dcp.HuggingFaceStorageReader(str(path))
        with timed() as loaded:
            dcp.load(self._flat, checkpoint_id=path, storage_reader=reader)
        return {"restore": loaded()}

    def _copies(self) -> list[Tensor]:
        if not hasattr(self, "_copied"):
            self._copied = [torch.zeros_like(tensor) for tensor in self._own]
        return self._copied


class Holdfast:
    """The same by the run's own parts."""

    def __init__(
        self, run: RunDirectory, world: World, state: TrainState, lease: Lease | None
    ) -> None:
        self._world, self._state = world, state
        self._step = 0
        self._manager: CheckpointManager | None = None
        if lease is None:
            assert state.spread is not None
            self._follower = OwnSlices(world, state, state.spread, run.path, None)
            return
        others = others_of_first(state, world, run.path)
        identity = CheckpointIdentity("benchmark", {}, "cpu", 1)
        self._manager = CheckpointManager(run, lease, identity, (KeepLast(1),), others=others)

    def save(self) -> dict[str, float]:
        """Until it is durable, verified and published."""
        self._step += 1
        if self._manager is None:
            with timed() as taken:
                self._follower.follow()
            return {"loop": taken(), "durable": 0.0}
        with timed() as taken:
            tensors, values = self._state.capture()
            self._manager.save(CheckpointContents(self._step, 0, "steps", {}, tensors, values))
            self._world.from_first("done")
        self._manager.wait()
        published = self._manager.poll()
        assert published is not None
        return {"loop": taken(), "durable": published.durable_s}

    def restore(self) -> dict[str, float]:
        """Verified, and put in the place of what was there."""
        with timed() as restored:
            if self._manager is None:
                path = self._world.told("checkpoint")
                folder = local_folder(Path(path))
                slicing = self._state.spread or WHOLE
                found = load_checkpoint(folder, manifest_of(folder), slicing=slicing, only_own=True)
            else:
                taken = self._manager.restore()
                assert taken is not None
                found = taken
                self._world.tell("checkpoint", str(found.path))
            self._state.restore(found.tensors, found.state)
        return {"restore": restored()}


def _writer(name: str, path: Path) -> Any:
    if not name.startswith(SAFETENSORS):
        return None
    return dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)


def _shares(paths: Sequence[Path], world: World) -> Iterator[tuple[Path, int, int]]:
    """Of which file this rank reads how many bytes, from where on: its part of all bytes."""
    total = sum(path.stat().st_size for path in paths)
    first, last = (total * rank // world.size for rank in (world.rank, world.rank + 1))
    begin = 0
    for path in paths:
        end = begin + path.stat().st_size
        start, stop = max(first, begin), min(last, end)
        yield path, start - begin, max(0, stop - start)
        begin = end


def measure(world: World, cases: Cases, repetitions: int) -> Timings:
    """Interleaved, so that drift hits all alike; the first rounds do not count."""
    timings: Timings = {name: {} for name in cases}
    order = random.Random(0)  # each finds what the one before it left in memory and on the disk
    for repetition in range(-NUM_WARM_UP, repetitions):
        for name in order.sample(list(cases), len(cases)):
            if world.rank == 0:
                os.sync()  # what the last one left unflushed is not to slow down the next
            world.gathered(None)  # begin together
            for kind, seconds in cases[name]().items():
                slowest = slowest_s(world, seconds)
                if repetition >= 0:
                    timings[name].setdefault(kind, []).append(slowest)
    return timings


def table(title: str, timings: Timings, references: Mapping[str, str]) -> str:
    """Medians, in brackets the ratio to the reference of each kind."""

    def cell(name: str, kind: str) -> str:
        if kind not in timings[name]:
            return ""
        ratio = median_ratio(timings[name][kind], timings[references[kind]][kind])
        return f"{median(timings[name][kind]) * 1e3:.0f} ms ({ratio:.2f})"

    words = {"loop": "from the loop", "durable": "to durable", "restore": "restore"}
    header = [title, *(words[kind] for kind in references)]
    return markdown_table(
        header, [[name, *(cell(name, kind) for kind in references)] for name in timings]
    )


def rank(arguments: argparse.Namespace, world: World) -> None:
    """One of the processes; rank 0 prints."""
    num_layers = max(1, arguments.megabytes * 10**6 // BYTES_PER_LAYER)
    overrides = (f"experiment.num_layers={num_layers}", f"distributed.num_processes={world.size}")
    told = StageArguments(
        experiment=f"{__file__}:Wide",
        store=arguments.meeting,
        run_id="run",
        num_threads=1,
        overrides=overrides,
        progress_format="none",
    )
    with prepared_stage(told, world=world) as stage:
        trainer = build_trainer(stage, Costs())
        trainer.train_step(next(trainer.steps()))
        state = trainer.state
        rivals = Rivals(arguments.meeting, world, state)
        num_bytes = sum(world.gathered(rivals.num_bytes))
        run = RunDirectory(arguments.meeting / "saved" / "run")
        with Lease.acquire(run, 60.0) if world.rank == 0 else nullcontext() as lease:
            holdfast = Holdfast(run, world, state, lease)
            if arguments.phase == "save":
                title = f"{num_bytes / 1e6:.0f} MB, {world.size} processes"
                cases: Cases = {
                    COPY: rivals.copy,
                    BARE: rivals.bare_write,
                    "Holdfast": holdfast.save,
                    **{
                        name + (" async" if is_async else ""): partial(
                            rivals.save_dcp, name, is_async=is_async
                        )
                        for name in (DEFAULT, SAFETENSORS)
                        for is_async in (False, True)
                    },
                }
                references = {"loop": COPY, "durable": BARE}
            else:
                title = f"written by {arguments.processes}, restored by {world.size}"
                cases = {BARE: rivals.bare_read, "Holdfast": holdfast.restore}
                cases |= {n: partial(rivals.load_dcp, n) for n in (DEFAULT, SAFETENSORS)}
                references = {"restore": BARE}
            timings = measure(world, cases, arguments.repetitions)
        if world.rank == 0:
            print(f"\n{table(title, timings, references)}", flush=True)


def main() -> None:
    """Start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--restore-processes", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    parser.add_argument("--meeting", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    if is_rank():
        with joined_world() as world:
            rank(arguments, world)
        return
    with tempfile.TemporaryDirectory(prefix=".together-", dir=arguments.folder) as name:
        run_in_ranks(arguments.processes, "--phase", "save", "--meeting", name)
        for number in arguments.restore_processes:
            run_in_ranks(number, "--phase", "restore", "--meeting", name)


if __name__ == "__main__":
    main()
