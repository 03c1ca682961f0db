"""Samples per second from stream files, beside webdataset and mosaicml-streaming on the same files.

All read the same samples in one process, shuffled, and make of each an image's bytes and a label.
Webdataset and mosaicml-streaming are no dependencies: what is not installed is left out. Then the
time to the first batch after a resume, at the beginning and at nine tenths of an epoch.

    python benchmarks/stream_speed.py [--samples N] [--files N]
"""

from __future__ import annotations

import argparse
import gc
import io
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from interleaving import markdown_table

from holdfast.training.data.batch_plan import FixedSizePlan
from holdfast.training.data.loader import Loader
from holdfast.training.data.own_order import own_permutation
from holdfast.training.streams.stream_files import StreamFiles

SAMPLE_BYTES = 16_384
BATCH_SIZE = 64
REPETITIONS = 5


def write(folder: Path, num_samples: int, num_files: int) -> None:
    """Tars of numbered samples of random bytes."""
    draws = np.random.RandomState(0)
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(num_samples), num_files)):
        with tarfile.open(
            folder / f"part-{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for sample in part:
                for suffix, content in (
                    ("jpg", draws.bytes(SAMPLE_BYTES)),
                    ("cls", str(sample % 10).encode()),
                ):
                    member = tarfile.TarInfo(f"{sample:08d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def decode(sample: dict[str, Any]) -> tuple[np.ndarray[Any, Any], int]:
    """Of any of the libraries' samples."""
    return np.frombuffer(sample["jpg"], np.uint8), int(sample["cls"])


class Counted:
    """Batches that are counted, not collated: collating is torch's with all of them."""

    @staticmethod
    def collate(items: list[Any]) -> list[Any]:
        """The items."""
        return items


class Files(Counted, StreamFiles):
    """The stream files with it."""


def loader_of(folder: Path) -> Loader:
    """The batches of a run."""
    dataset = Files(folder, decode)
    plan = FixedSizePlan(len(dataset), BATCH_SIZE, False, 0, own_permutation(dataset))
    return Loader(dataset, plan, seed=0)


def ours(folder: Path, num_samples: int) -> Callable[[], int]:
    """An epoch of StreamFiles through the loader."""
    loader = loader_of(folder)

    def run() -> int:
        steps, num = loader.steps(0, 0), 0
        while num < num_samples:
            num += len(next(steps).batch)
        return num

    return run


def of_webdataset(folder: Path, num_samples: int) -> Callable[[], int]:  # noqa: ARG001
    """An epoch of webdataset, files shuffled, and a buffer of as many samples as a window has."""
    import webdataset

    names = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(names, shardshuffle=100).shuffle(4096).map(decode)

    def run() -> int:
        return sum(1 for _ in data)

    return run


def of_mosaic(folder: Path, num_samples: int) -> Callable[[], int]:
    """An epoch of mosaicml-streaming on its own files with the same samples."""
    import streaming

    own = folder.parent / "mds"
    columns = {"jpg": "bytes", "cls": "str"}
    with streaming.MDSWriter(out=str(own), columns=columns) as writer:
        files = StreamFiles(folder)
        for number in range(num_samples):
            sample = files[number]
            writer.write({"jpg": sample["jpg"], "cls": sample["cls"].decode()})
    data = streaming.StreamingDataset(local=str(own), shuffle=True, batch_size=BATCH_SIZE)

    def run() -> int:
        return sum(1 for sample in data if decode(sample))

    return run


RIVALS = {
    "webdataset": ("webdataset", of_webdataset),
    "mosaicml-streaming": ("streaming", of_mosaic),
}


def rates(folder: Path, num_samples: int) -> Iterator[list[str]]:
    """A row for each library; they take turns."""
    cases = {"holdfast": ours(folder, num_samples)}
    for name, (module, build) in RIVALS.items():
        if find_spec(module) is not None:
            try:
                cases[name] = build(folder, num_samples)
            except ImportError as error:
                yield [name, f"cannot be imported: {error}", ""]
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(REPETITIONS + 1):
        for name, run in cases.items():
            start_s = time.perf_counter()
            assert run() == num_samples
            if repetition:  # the first one fills the page cache
                seconds[name].append(time.perf_counter() - start_s)
    best = median(seconds["holdfast"])
    for name, times in seconds.items():
        yield [name, f"{num_samples / median(times):,.0f}", f"{median(times) / best:.2f}"]


def first_batch_s(folder: Path, part: float) -> float:
    """From an index that is there to the first batch at a part of an epoch."""
    gc.collect()
    start_s = time.perf_counter()
    loader = loader_of(folder)
    next(loader.steps(0, int(part * loader.plan.num_steps(0))))
    return time.perf_counter() - start_s


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=50)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tar"
        write(folder, arguments.samples, arguments.files)
        header = ["library", "samples/s", "times as long"]
        print(markdown_table(header, list(rates(folder, arguments.samples))), end="\n\n")
        times = {part: median(first_batch_s(folder, part) for _ in range(9)) for part in (0, 0.9)}
        rows = [[f"{part:g} of the epoch", f"{1000 * s:.1f}"] for part, s in times.items()]
        print(markdown_table(["first batch after a resume at", "ms"], rows))


if __name__ == "__main__":
    main()
