"""Real processes that are killed at every named point of a commit.

Whatever the point, the next process finds the newest checkpoint that was acknowledged, or a newer
one, with the right bytes; nothing unreadable lies beside it; and the run ends as if nothing had
happened.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.training.checkpointing.manifest import Manifest, verify
from holdfast.training.checkpointing.policy import KeepLast, KeepTopK, Retention
from holdfast.training.runs.faultpoints import FAULT_POINTS, POINT_VARIABLE
from holdfast.training.runs.paths import RunDirectory, parse_step
from tests.training.checkpointing.checkpoints import (
    assert_holds,
    contents_at,
    in_child,
    managing,
    names,
)

NUM_STEPS = 6
POLICIES: tuple[Retention, ...] = (KeepLast(2), KeepTopK(2, "loss", "min"))
LOSSES = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.6}
ACKNOWLEDGED = "acknowledged"


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    """A run in memory where there is such a place: killing a process needs no disk."""
    shared = Path("/dev/shm")
    folder = tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None)
    yield RunDirectory(Path(folder) / "digits" / "a")
    shutil.rmtree(folder)


def train(run: RunDirectory) -> None:
    """Save each step twice: as a step's, then, with metrics, as an epoch's in its place.

    At the third step the newest checkpoint is found damaged, once.
    """
    with managing(run, POLICIES) as manager:
        restored = manager.restore()
        step = 0 if restored is None else restored.manifest.step
        if restored is not None and restored.manifest.trigger == "steps":
            step -= 1  # the epoch's end comes again
        while step < NUM_STEPS:
            step += 1
            manager.save(contents_at(step), wait=True)
            acknowledge(run, step)
            if step == 3 and not (run.path / "damaged").exists():
                damage(run, step)
                assert manager.restore() is not None
            manager.save(contents_at(step, "epoch", loss=LOSSES[step]), wait=True)
            acknowledge(run, step)


def acknowledge(run: RunDirectory, step: int) -> None:
    (run.path / ACKNOWLEDGED).write_text(str(step))


def damage(run: RunDirectory, step: int) -> None:
    acknowledge(run, step - 1)
    (run.path / "damaged").touch()
    (run.checkpoint(step) / "model.safetensors").write_bytes(b"damaged")


def run_process(run: RunDirectory, point: str | None = None) -> int:
    """``train`` in a process of its own, killed at a point. Returns the exit code."""

    def child() -> None:
        if point is not None:
            os.environ[POINT_VARIABLE] = point
        train(run)

    return in_child(child)


def committed(run: RunDirectory) -> dict[int, Manifest]:
    """Every committed checkpoint, all of which must verify but the one that was damaged."""
    found = {}
    for name in names(run.checkpoints) if run.checkpoints.exists() else []:
        step = parse_step(name)
        path = run.checkpoints / name / "model.safetensors"
        if step is not None and path.read_bytes() != b"damaged":
            found[step] = verify(run.checkpoints / name)
    return found


def check_after_a_kill(run: RunDirectory) -> None:
    acknowledged = run.path / ACKNOWLEDGED
    floor = int(acknowledged.read_text()) if acknowledged.exists() else 0
    full = [step for step, manifest in committed(run).items() if manifest.kind == "full"]
    assert max(full, default=0) >= floor
    with managing(run, POLICIES) as manager:
        restored = manager.restore()
    if restored is not None:
        assert restored.manifest.step == max(full)
        assert_holds(restored.tensors, restored.manifest.step)
    else:
        assert floor == 0


def outcome(run: RunDirectory) -> dict[int, Manifest]:
    """What a finished run holds, without what says when it was written."""
    return {step: replace_time(manifest) for step, manifest in sorted(committed(run).items())}


def replace_time(manifest: Manifest) -> Manifest:
    return manifest.model_copy(update={"created_at": "", "segment": 0})


def is_killed_and_recovers(run: RunDirectory, point: str) -> bool:
    """Kill at a point and let the run finish. False if it was never reached."""
    code = run_process(run, point)
    assert code in (0, -signal.SIGKILL)
    check_after_a_kill(run)
    if code == 0:
        return False
    assert run_process(run) == 0
    return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Manifest]:
    calm = RunDirectory(tmp_path_factory.mktemp("store") / "digits" / "calm")
    assert run_process(calm) == 0
    assert [*outcome(calm)] == [2, 5, 6]
    return outcome(calm)


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_at_this_point_loses_nothing(
    run: RunDirectory, undisturbed: dict[int, Manifest], point: str
) -> None:
    assert is_killed_and_recovers(run, point)
    assert outcome(run) == undisturbed
    shutil.rmtree(run.path)
    later = random.Random(point).randint(2, 12)
    is_killed_and_recovers(run, f"{point}:{later}")
    assert outcome(run) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("point", FAULT_POINTS)
def test_a_kill_at_each_passage_of_this_point_loses_nothing(
    run: RunDirectory, undisturbed: dict[int, Manifest], point: str
) -> None:
    number = 1
    while is_killed_and_recovers(run, f"{point}:{number}"):
        assert outcome(run) == undisturbed
        shutil.rmtree(run.path)
        number += 1
    assert number > 1


def test_many_kills_of_one_run_lose_nothing(
    run: RunDirectory, undisturbed: dict[int, Manifest]
) -> None:
    rng = random.Random(7)
    for _ in range(25):
        run_process(run, f"{rng.choice(list(FAULT_POINTS))}:{rng.randint(1, 6)}")
        check_after_a_kill(run)
    assert run_process(run) == 0
    assert outcome(run) == undisturbed
