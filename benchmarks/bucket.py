"""What a store that is a bucket costs, beside the client library alone; the server is on loopback.

    python benchmarks/bucket.py transfer [--megabytes 400] [--repetitions 5]
    python benchmarks/bucket.py stall [--megabytes 400] [--repetitions 5]
    python benchmarks/bucket.py requests
    python benchmarks/bucket.py status [--runs 1000]

The server is SeaweedFS where ``weed`` is on the path, else moto; ``requests`` are counted on the
way to moto.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["PYTHONPATH"] = sys.path[0]  # of the commands that are started here

import obstore
import torch
from checkpoint import flat, make_state, timed
from interleaving import interleaved, markdown_table, median_ratio

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.manager import (
    CheckpointContents,
    CheckpointIdentity,
    CheckpointManager,
)
from holdfast.training.checkpointing.policy import KeepLast
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.storage.bucket import Bucket
from holdfast.training.storage.opening import open_store
from holdfast.training.storage.protocol import PART_BYTES, ObjectStore
from holdfast.training.tiers.companion import Companion
from holdfast.training.tiers.head import head_key, read_head, run_folder
from holdfast.training.tiers.keeping import opened_replica
from holdfast.training.tiers.listing import READ
from holdfast.training.tiers.restoring import restore_folder
from holdfast.training.tiers.scratch import run_name, tier_folder
from holdfast.training.tiers.transfer import download_file, read_tree, upload_file
from holdfast.training.tiers.tree import Tree, TreeFile, newest_steps
from tests.contracts.fault_proxy import FaultProxy, hurt_way
from tests.contracts.object_servers import make_bucket, moto, seaweedfs

ADDRESS = Address("s3", "runs", "bench")
NUM_FILES = 4
PARTS_AT_ONCE = 8
IDLE_S = 20.0
PATIENCE_S = 300.0


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A server with a bucket, which the environment leads to; its name."""
    name = "SeaweedFS" if shutil.which("weed") else "moto"
    (folder / "server").mkdir()
    serving = seaweedfs(folder / "server") if name == "SeaweedFS" else moto()
    with serving as environment:
        make_bucket(environment, ADDRESS.bucket)
        os.environ |= {**environment, "HOLDFAST_SCRATCH": str(folder / "scratch")}
        yield name


class Transfer:
    """Four files on their way up and down, with us and with the client library alone."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        store = open_store(ADDRESS)
        assert isinstance(store, Bucket)
        self._store, self._client, self._folder = store, store._bulk, folder
        self._files: dict[str, TreeFile] = {}
        self._num_restored = 0
        self._sources = [folder / f"source-{number}" for number in range(NUM_FILES)]
        for source in self._sources:
            source.write_bytes(secrets.token_bytes(num_bytes // NUM_FILES))

    def upload(self) -> None:
        """Digested, and verified by the server's checksums."""
        for source in self._sources:
            key = f"runs/a/b/{source.name}"
            self._files[source.name] = upload_file(self._store, source, key)

    def upload_alone(self) -> None:
        """As many parts at once, as large ones."""
        options = {"chunk_size": PART_BYTES, "max_concurrency": PARTS_AT_ONCE}
        for source in self._sources:
            with source.open("rb") as file:
                obstore.put(
                    self._client, f"alone/{source.name}", file, use_multipart=True, **options
                )

    def download(self) -> None:
        """Digested, written and flushed."""
        for name, file in self._files.items():
            download_file(self._store, file, self._folder / f"{name}-down")

    def download_alone(self) -> None:
        """Written and flushed."""
        for source in self._sources:
            with (self._folder / f"{source.name}-alone").open("wb") as file:
                for part in self._parts(source):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())

    def restore(self) -> None:
        """Into the folder of a run that is not there yet."""
        self._num_restored += 1
        run = RunDirectory(self._folder / f"store-{self._num_restored}" / "a" / "b")
        run.path.parent.mkdir(parents=True)
        restore_folder(self._store, Tree(self._files), "blake3:0", run)

    def read_alone(self) -> None:
        """Into nothing."""
        for source in self._sources:
            for _ in self._parts(source):
                pass

    def _parts(self, source: Path) -> Iterator[obstore.Bytes]:
        return iter(obstore.get(self._client, f"alone/{source.name}").stream(PART_BYTES))


def transfer(folder: Path, megabytes: int, repetitions: int) -> None:
    """Upload, download and restore, each rival in its turn."""
    with server(folder) as name:
        on_way = Transfer(folder, megabytes * 10**6)
        rivals = {
            "upload": (on_way.upload, on_way.upload_alone),
            "download to flushed files": (on_way.download, on_way.download_alone),
            "restore of a run, beside reading": (on_way.restore, on_way.read_alone),
        }
        rows = []
        for what, (ours, alone) in rivals.items():
            seconds = interleaved({"holdfast": ours, "alone": alone}, repetitions)
            told = [f"{median(one):.2f} s" for one in seconds.values()]
            ratio = median_ratio(seconds["holdfast"], seconds["alone"])
            rows.append([what, *told, f"{ratio:.2f}"])
    print(f"{megabytes} MB in {NUM_FILES} files, {name}, {repetitions} repetitions; medians\n")
    print(markdown_table(["", "holdfast", "client alone", "ratio"], rows))


def stall(folder: Path, megabytes: int, repetitions: int) -> None:
    """What the loop waits for at a save, with and without a bucket that is kept up to date."""
    state = make_state(megabytes * 10**6)
    tensors = flat(state)
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    seconds: dict[str, list[float]] = {}

    def note(kind: str, taken_s: float, repetition: int) -> None:
        if repetition >= 0:
            seconds.setdefault(kind, []).append(taken_s)

    def copied() -> float:
        with timed() as taken:
            for name, tensor in tensors.items():
                copies[name].copy_(tensor)
        return taken()

    with server(folder) as name:
        plain, kept = new_run(folder / "plain"), new_run(tier_folder(ADDRESS, "work"))
        companion = Companion.start(str(ADDRESS), run_name(kept))
        kept.run_json.write_text("{}")
        with Lease.acquire(plain, 60.0) as one, Lease.acquire(kept, 60.0) as other:
            identity = CheckpointIdentity("benchmark", {}, "cpu", 1)
            alone = CheckpointManager(plain, one, identity, (KeepLast(1),))
            beside = CheckpointManager(kept, other, identity, (KeepLast(1),))
            for repetition in range(-1, repetitions):
                step = 2 * (repetition + 2)
                note("copy", copied(), repetition)
                note("save", saved(alone, step, state), repetition)
                alone.wait()
                saved(beside, step, state)
                beside.wait()
                time.sleep(1.5)  # it is on its way up now
                note("copy beside an upload", copied(), repetition)
                note("save beside an upload", saved(beside, step + 1, state), repetition)
                beside.wait()
                wait_for_step(kept, step + 1)
        companion.finish()
    print(f"{megabytes} MB, {name}, {repetitions} repetitions; medians\n")
    rows = []
    for suffix, what in (("", "folder alone"), (" beside an upload", "while a state goes up")):
        copy_s, save_s = seconds[f"copy{suffix}"], seconds[f"save{suffix}"]
        told = [f"{median(one) * 1e3:.0f} ms" for one in (copy_s, save_s)]
        rows.append([what, *told, f"{median_ratio(save_s, copy_s):.2f}"])
    print(markdown_table(["", "memory copy", "save, from the loop", "ratio"], rows))


def new_run(store: Path) -> RunDirectory:
    run = RunDirectory(store / "benchmark" / "run")
    run.path.mkdir(parents=True)
    return run


def saved(
    manager: CheckpointManager, step: int, state: dict[str, dict[str, torch.Tensor]]
) -> float:
    """Seconds that the loop was kept."""
    manager.poll()
    with timed() as taken:
        manager.save(CheckpointContents(step, 0, "steps", {}, state, {}))
    return taken()


def wait_for_step(run: RunDirectory, step: int) -> None:
    """Until the bucket has it."""
    store, name, deadline_s = open_store(ADDRESS), run_name(run), time.monotonic() + PATIENCE_S
    while step not in newest_steps(tree_of(store, name)):
        assert time.monotonic() < deadline_s
        time.sleep(0.5)


def tree_of(store: ObjectStore, name: str) -> Tree:
    """The files that a run has in the bucket now."""
    found = read_head(store, name)
    if found is None or found[0].tree is None or found[0].tree_digest is None:
        return Tree()
    return read_tree(store, found[0].tree, found[0].tree_digest, run_folder(name))


def requests(folder: Path) -> None:
    """How many requests a save takes, and an hour in which nothing is saved."""
    with moto() as server:
        make_bucket(server, ADDRESS.bucket)
        with hurt_way(server) as (proxy, environment):
            os.environ |= {**environment, "HOLDFAST_SCRATCH": str(folder / "scratch")}
            rows = [counted_row(proxy, megabytes) for megabytes in (1, 400)]
            rows.append(idle_row(proxy))
    print(markdown_table(["", "writes", "reads"], rows))


def counted_row(proxy: FaultProxy, megabytes: int) -> list[str]:
    """A state as training saves it: weights, two moments, an average, and small files."""
    run = RunDirectory(tier_folder(ADDRESS, "work") / "benchmark" / f"of-{megabytes}")
    with opened_replica(run) as replica:
        assert replica is not None
        for step in (1, 2, 3):
            folder = run.checkpoint(step)
            folder.mkdir(parents=True)
            run.run_json.write_text("{}")
            for name, share in (("model", 1), ("optimizer", 2), ("ema", 1)):
                content = secrets.token_bytes(share * megabytes * 10**6 // 4)
                (folder / f"{name}.safetensors").write_bytes(content)
            (folder / "state.json").write_text("x" * 4000)
            (folder / "manifest.json").write_text(str(step))
            before = proxy.counted()
            replica.bring_up()
            taken = proxy.counted(before)
    return told_row(f"a save of {megabytes} MB", taken, 1)


def idle_row(proxy: FaultProxy) -> list[str]:
    """A run that is written, and has nothing new."""
    run = RunDirectory(tier_folder(ADDRESS, "work") / "benchmark" / "idle")
    run.path.mkdir(parents=True)
    run.run_json.write_text("{}")
    with opened_replica(run) as replica:
        assert replica is not None
        replica.start()
        time.sleep(IDLE_S / 2)
        before = proxy.counted()
        time.sleep(IDLE_S)
        taken = proxy.counted(before)
        replica.finish(10.0)
    return told_row("an hour without a save", taken, round(3600 / IDLE_S))


def told_row(what: str, taken: dict[str, int], factor: int) -> list[str]:
    num_reads = taken.get("GET", 0) * factor
    num_writes = (taken.get("PUT", 0) + taken.get("POST", 0)) * factor
    return [what, str(num_writes), str(num_reads)]


def status(folder: Path, num_runs: int) -> None:
    """Two calls: the first has nothing of the runs, the second what the first has read."""
    with server(folder) as name:
        overrides = ("train.num_epochs=2", "export.num_latency_runs=10")
        options = [word for one in overrides for word in ("--set", one)]
        holdfast("run", "digits", "--run-id", "first", *options)
        multiply(open_store(ADDRESS), "digits/first", num_runs)
        rows = []
        for what in ("first call", "second call"):
            seconds = []
            for number in range(3):
                if what == "first call":
                    os.environ["HOLDFAST_SCRATCH"] = str(folder / f"view-{number}")
                with timed() as taken:
                    holdfast("status")
                seconds.append(taken())
            rows.append([what, f"{median(seconds):.1f} s"])
        with timed() as taken:
            holdfast("--help", is_with_store=False)
        rows.append(["of it, to start the command", f"{taken():.1f} s"])
    print(f"{num_runs:,} runs, {name}; median of three\n")
    print(markdown_table(["", "`holdfast status`"], rows))


def holdfast(*arguments: str, is_with_store: bool = True) -> None:
    store = ("--store", str(ADDRESS)) if is_with_store else ()
    command = [sys.executable, "-P", "-m", "holdfast", *arguments, *store]
    quiet = subprocess.DEVNULL
    subprocess.run(command, stdout=quiet, stderr=quiet, check=True)


def multiply(store: ObjectStore, name: str, num_runs: int) -> None:
    """So many runs as the named one; of its files those that a list of runs reads."""
    found = read_head(store, name)
    assert found is not None
    tree, folder = tree_of(store, name), run_folder(name)
    light = {
        path: store.get(file.key)
        for path, file in tree.files.items()
        if file.key and READ.fullmatch(path)
    }

    def copy(number: int) -> None:
        other = f"digits/run-{number:05d}"
        files = {
            path: replace(file, key=file.key.replace(folder, run_folder(other)))
            for path, file in tree.files.items()
        }
        for path, content in light.items():
            assert content is not None
            store.put(files[path].key, content.content, "any")
        content = Tree(files).to_bytes()
        key = f"{run_folder(other)}/{found[0].folder}/tree.json"
        store.put(key, content, "any")
        head = replace(found[0], tree=key, tree_digest=digest_of([content]))
        store.put(head_key(other), head.to_bytes(), "any")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, range(1, num_runs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["transfer", "stall", "requests", "status"])
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1000)
    arguments = parser.parse_args()
    sized = (arguments.megabytes, arguments.repetitions)
    measured: dict[str, Callable[[Path], None]] = {
        "transfer": lambda folder: transfer(folder, *sized),
        "stall": lambda folder: stall(folder, *sized),
        "requests": requests,
        "status": lambda folder: status(folder, arguments.runs),
    }
    with tempfile.TemporaryDirectory(prefix=".bucket-", dir=arguments.folder) as name:
        measured[arguments.what](Path(name))


if __name__ == "__main__":
    main()
