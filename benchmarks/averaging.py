"""Averaging five weight files, against reading them: time, and memory above the interpreter.

The files lie in the page cache: a small buffer is then the least that reading can cost, since its
bytes never leave the processor's cache; reading into memory is what averaging without a stream has
to do first. Averaging maps the files and computes in fp64. Verifying reads every byte once more
for its digest, once for all candidates that are made of a file. Memory is that of a process that
does nothing else.

    python benchmarks/averaging.py [--folder F] [--megabytes N] [--repetitions N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from interleaving import interleaved, markdown_table, median_ratio

from holdfast.training.averages import averaging
from holdfast.training.averages.averaging import Term, write_average, write_weights
from holdfast.training.checkpointing.local_files import read_file

NUM_FILES = 5
TENSOR_BYTES = 40 * 10**6
CHUNK_BYTES = 8 * 2**20
MAX_BYTES = 1.2e9
REFERENCES = (
    ("average", "read through one small buffer"),
    ("average", "read each into memory"),
    ("average, write and flush", "read, write and flush one"),
)

MEMORY = """
import sys
from pathlib import Path
import torch
from holdfast.training.averages.averaging import Term, write_average
def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
torch.zeros(1).double().add_(torch.zeros(1))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before_bytes = peak_bytes()
*sources, target = map(Path, sys.argv[1:])
write_average(target, [Term(source) for source in sources])
print(peak_bytes() - before_bytes)
"""


def make_files(folder: Path, num_bytes: int) -> list[Path]:
    """Files of fp32 tensors of 40 MB."""
    paths = []
    for number in range(NUM_FILES):
        path = folder / f"step-{number:08d}.safetensors"
        generator = torch.Generator().manual_seed(number)
        tensors = {
            f"layer-{i:03d}": torch.randn(TENSOR_BYTES // 4, generator=generator)
            for i in range(max(1, num_bytes // TENSOR_BYTES))
        }
        write_weights(path, tensors)
        paths.append(path)
    return paths


def read(paths: Sequence[Path]) -> None:
    """The least that any averaging has to do."""
    buffer = bytearray(CHUNK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load(paths: Sequence[Path]) -> None:
    """Read each file into memory that is new, one after the other."""
    for path in paths:
        path.read_bytes()


def copy(paths: Sequence[Path], target: Path) -> None:
    """Read all of them, and write as many bytes as one has, with one flush."""
    read(paths)
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with target.open("wb", buffering=0) as file:
        for start in range(0, paths[0].stat().st_size, CHUNK_BYTES):
            file.write(buffer[: paths[0].stat().st_size - start])
        os.fsync(file.fileno())
    target.unlink()


def compute(paths: Sequence[Path]) -> None:
    """Averages that are written nowhere."""
    for _ in averaging.averages([Term(path) for path in paths]):
        pass


def write(paths: Sequence[Path], target: Path) -> None:
    """Averages in a file that is on the disk."""
    write_average(target, [Term(path) for path in paths])
    target.unlink()


def verify(paths: Sequence[Path]) -> None:
    """The digest of each file, as a checkpoint's manifest has it."""
    for path in paths:
        read_file(path, "blake3", on_bytes=lambda _: None)


def peak_bytes(paths: Sequence[Path], target: Path) -> int:
    """Peak resident bytes of a process that averages, above those before it began."""
    command = [sys.executable, "-c", MEMORY, *map(str, paths), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    target.unlink()
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=400, help="of each file")
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".averaging-", dir=arguments.folder) as name:
        paths = make_files(Path(name), arguments.megabytes * 10**6)
        target = Path(name) / "average.safetensors"
        num_bytes = sum(path.stat().st_size for path in paths)
        cases = {
            "read through one small buffer": lambda: read(paths),
            "read each into memory": lambda: load(paths),
            "average": lambda: compute(paths),
            "verify digests": lambda: verify(paths),
            "read, write and flush one": lambda: copy(paths, target),
            "average, write and flush": lambda: write(paths, target),
        }
        seconds = interleaved(cases, arguments.repetitions)
        memory_bytes = peak_bytes(paths, target)
    rows = [
        [case, f"{median(times):.2f} s", f"{num_bytes / median(times) / 1e9:.2f} GB/s"]
        for case, times in seconds.items()
    ]
    print(f"{NUM_FILES} files of {num_bytes / NUM_FILES / 1e6:.0f} MB, ", end="")
    print(f"{torch.get_num_threads()} threads, {arguments.repetitions} repetitions; medians\n")
    print(markdown_table(["", "time", "bytes read per second"], rows))
    print()
    for case, reference in REFERENCES:
        speed = 1 / median_ratio(seconds[case], seconds[reference])
        print(f"speed of '{case}' / of '{reference}': {speed:.2f}")
    print(f"peak memory above the interpreter: {memory_bytes / 1e6:.0f} MB (aim 1200)")
    if memory_bytes > MAX_BYTES:
        sys.exit("averaging took more memory than 1.2 GB")


if __name__ == "__main__":
    main()
