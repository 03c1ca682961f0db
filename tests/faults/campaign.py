"""Kill a training at seeded moments until it completes, and compare bytes with a calm one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.loading import load_checkpoint, load_weights
from holdfast.training.checkpointing.manifest import (
    Manifest,
    local_folder,
    read_manifest,
    verify,
)
from holdfast.training.checkpointing.policy import KeepTopK
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.paths import RunDirectory, parse_step
from tests.warm_start import WarmProcess

HARD = f"{Path(__file__).with_name('hard_experiment.py')}:Hard"
Ranking = tuple[str, Literal["min", "max"]]
HARD_IN_SHARDS = f"{HARD}InShards"  # the class Hard, in shards
SPREAD = "distributed.strategy=fsdp"
MAX_SEGMENTS = 60
# Each training is a run of its own, and is killed where it trains.
UNREHEARSED = {"HOLDFAST_REHEARSAL_DEPTH": "none"}
SEGMENT_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Training:
    """A training that is to be killed: what to run, and where.

    ``is_cold`` starts Python anew for each of its segments, as users do; see ``WarmProcess``. With
    ``most_processes`` each segment has another number of them, in slices the next power of two, and
    any of them may be killed.
    """

    store: Path
    run_id: str
    experiment: str = HARD
    overrides: tuple[str, ...] = ()
    is_cold: bool = False
    most_processes: int = 1

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.store / experiment_name(self.experiment) / self.run_id)

    @property
    def widths(self) -> list[int]:
        """How many processes segments have, one after the other, and then again."""
        widths = range(self.most_processes, 0, -1)
        is_any = SPREAD not in self.overrides
        return [width for width in widths if is_any or width.bit_count() == 1]

    def start(
        self,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        stage: str = "segment",
    ) -> Segment:
        """Start a stage as a process in a group of its own."""
        told = [stage, "--progress", "jsonl", "--experiment", self.experiment]
        told += ["--store", str(self.store), "--run-id", self.run_id, *arguments]
        for override in self.overrides:
            told += ["--set", override]
        if self.most_processes > 1:
            number = len(list(self.run.segments.glob("*.json")))
            width = self.widths[number % len(self.widths)]
            told += ["--set", f"distributed.num_processes={width}"]
        surroundings = {**child_environment(1), **UNREHEARSED, **(environment or {})}
        if not self.is_cold:
            return Segment(WarmProcess(told, surroundings))
        return Segment(
            subprocess.Popen(
                python_command("holdfast.training", *told),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=surroundings,
                start_new_session=True,
            )
        )


@dataclass
class Segment:
    """A running segment whose events are read while it works."""

    process: subprocess.Popen[str] | WarmProcess
    events: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _queue: queue.Queue[dict[str, object] | None] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self._threads = [
            threading.Thread(target=self._read_events, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, *names: str) -> dict[str, object] | None:
        """The next event of one of these names; None where the process ended before."""
        while True:
            event = self._queue.get(timeout=SEGMENT_TIMEOUT_S)
            if event is None or event["event"] in names:
                return event

    def kill(self, number: signal.Signals, rng: random.Random | None = None) -> None:
        """Send a signal to the process, or with ``rng`` to one of its ranks, where it has any."""
        ranks = [pid for event in self.events for pid in event.get("pids", [])]
        pids = [self.process.pid, *ranks]
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids) if rng is not None and ranks else pids[0], number)

    def has_lost_a_rank(self) -> bool:
        """Whether it ended because one of several processes did."""
        error = self.events[-1].get("error") if self.events else None
        return isinstance(error, dict) and error.get("type") == "RankLostError"

    def finish(self) -> int:
        """Wait for the end; returns the exit code."""
        code = self.process.wait(timeout=SEGMENT_TIMEOUT_S)
        for thread, stream in zip(
            self._threads, (self.process.stdout, self.process.stderr), strict=True
        ):
            thread.join()
            assert stream is not None
            stream.close()
        return code

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.events.append(event)
            self._queue.put(event)
        self._queue.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)


def complete(training: Training) -> Segment:
    """Run one segment that nobody interrupts. Returns it once it has completed."""
    segment = training.start()
    code = segment.finish()
    assert code == 0, f"exit code {code}\n{''.join(segment.errors)}"
    return segment


def kill_until_complete(
    training: Training,
    rng: random.Random,
    num_kills: int,
    longest_life_s: float,
    fault_points: Sequence[str] = (),
) -> list[str]:
    """Kill the first segments at random moments, then let the run complete.

    Half of the moments lie within the first part of a segment's training, where the next
    checkpoint may not have come yet. With ``fault_points``, half of the kills happen at one of
    these. Returns the kills that found the segment alive.
    """
    deeds: list[str] = []
    for _ in range(MAX_SEGMENTS):
        deed = ""
        if len(deeds) >= num_kills:
            segment = training.start()
        elif fault_points and rng.random() < 0.5:
            deed = f"{rng.choice(fault_points)}:{rng.randint(1, 2)}"
            segment = training.start({"HOLDFAST_FAULT_POINT": deed})
        else:
            segment = training.start()
            deed = _kill_once(segment, rng, longest_life_s)
        code = segment.finish()
        check_latest_is_good(training.run)
        if code == 0:
            return deeds
        is_killed = code in (75, -signal.SIGKILL, -signal.SIGTERM) or segment.has_lost_a_rank()
        assert is_killed, "".join(segment.errors)
        deeds.append(deed)
    raise AssertionError(f"not complete after {MAX_SEGMENTS} segments: {deeds}")


def kill_at_fault_point(training: Training, fault_point: str, count: int) -> bool:
    """Run a segment that kills itself at a point of a commit. Whether it got there."""
    segment = training.start({"HOLDFAST_FAULT_POINT": f"{fault_point}:{count}"})
    code = segment.finish()
    check_latest_is_good(training.run)
    assert code in (0, -signal.SIGKILL), "".join(segment.errors)
    return code != 0


def check_latest_is_good(run: RunDirectory) -> None:
    """The newest committed checkpoint verifies, at any moment."""
    committed = sorted(_committed(run))
    if committed:
        verify(run.checkpoint(committed[-1]))


def final_state(run: RunDirectory, ranking: Ranking = ("accuracy", "max")) -> dict[str, bytes]:
    """Every byte that must not depend on interruptions.

    All files of the final checkpoint but the manifest, which says when it was written; of slices
    the tensors that they are of. And the weights and metrics of each checkpoint that selection can
    choose by ``ranking``.
    """
    committed = sorted(_committed(run))
    manifests = {step: read_manifest(run.checkpoint(step)) for step in committed}
    state = _content(run.checkpoint(committed[-1]), manifests[committed[-1]])
    # How many others are still on disk depends on when they were written; what can be among the
    # best three does not.
    best = KeepTopK(3, *ranking).keep([manifest.info for manifest in manifests.values()])
    for step in best:
        weights = {name: _bytes(t) for name, t in load_weights(run.checkpoint(step)).items()}
        told = [manifests[step].metrics, {name: digest_of([w]) for name, w in weights.items()}]
        state[f"selectable {step}"] = json.dumps(told, sort_keys=True).encode()
    return state


def _content(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    if "fsdp" not in str(manifest.config.get("distributed")):
        files = (path for path in folder.iterdir() if path.name != "manifest.json")
        return {path.name: path.read_bytes() for path in files}
    restored = load_checkpoint(local_folder(folder), manifest)
    tensors = (
        (f"{stem}.{name}", _bytes(tensor))
        for stem, inner in restored.tensors.items()
        for name, tensor in inner.items()
    )
    return {**dict(tensors), "state.json": (folder / "state.json").read_bytes()}


def _bytes(tensor: Tensor) -> bytes:
    told = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return told + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def _kill_once(segment: Segment, rng: random.Random, longest_life_s: float) -> str:
    number = rng.choice([signal.SIGTERM, signal.SIGKILL])
    if rng.random() < 0.1:
        delay_s = rng.uniform(0, 2.0)  # while the process starts
    else:
        segment.wait_for("started")
        delay_s = rng.uniform(0, longest_life_s) * rng.choice([0.2, 1.0])
    time.sleep(delay_s)
    segment.kill(number, rng)
    return f"{number.name} after {delay_s:.3f} s"


def _committed(run: RunDirectory) -> Iterator[int]:
    if run.checkpoints.is_dir():
        for path in run.checkpoints.iterdir():
            step = parse_step(path.name)
            if step is not None:
                yield step
