"""Checkpoints that are read to a device: what lies there, what does not, and when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.checkpointing.manager import RestoredCheckpoint
from holdfast.training.runs.paths import RunDirectory
from tests.training.checkpointing.checkpoints import assert_holds, managing, save_steps
from tests.training.far_memory import Far, FarReader, Forgetful, LastMoment, Short


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "digits" / "a")
    save_steps(run, 10)
    return run


def restored_by(reader: FarReader, run: RunDirectory) -> RestoredCheckpoint:
    with managing(run) as manager:
        restored = manager.restore(device=reader)
    assert restored is not None
    assert_holds(restored.tensors, 10)
    return restored


def far_stems(restored: RestoredCheckpoint) -> set[str]:
    return {
        stem
        for stem, tensors in restored.tensors.items()
        if any(isinstance(tensor, Far) for tensor in tensors.values())
    }


def test_all_but_the_generators_state_lies_on_the_device(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    assert far_stems(restored_by(FarReader(), run)) == {"model", "optimizer", "ema"}
    assert not caplog.records


def test_where_there_is_no_room_for_all_nothing_lies_there(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    num_bytes = sum(path.stat().st_size for path in run.checkpoint(10).iterdir())
    reader = FarReader(free_bytes=num_bytes)
    assert far_stems(restored_by(reader, run)) == set()
    assert reader.num_read == 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (Forgetful, "it gives other bytes back than it was given"),
        (Short, "CUDA out of memory. Tried to allocate"),
    ],
)
def test_a_device_that_fails_is_told_of_and_does_without(
    run: RunDirectory, bad: type[LastMoment], problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert far_stems(restored_by(FarReader([LastMoment(), bad()]), run)) == set()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"{run.checkpoint(10) / name}.safetensors is read to memory first, not to the device: "
        f"{problem}"
        for name in ("ema", "model", "optimizer")
    ]
