"""Disks that fail, fill up, and lose files: one line, nothing half, and the same bytes later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from holdfast.training.runs.directory import RunDirectory
from tests.faults.campaign import (
    Segment,
    Training,
    check_latest_is_good,
    complete,
    differences,
    final_state,
)
from tests.generality.harness import QUICK_EXPORT
from tests.training.bundles.small_bundle import files_of
from tests.training.checkpointing.checkpoints import on_a_small_disk

FAILING = f"{Path(__file__).with_name('failing_disk.py')}:Hard"
NUM_FAILURES = 61
SHORT = ("checkpoint.every_steps=5", "train.num_epochs=3")
STAGES = ("segment", "candidates", "evaluate", "export", "promote", "report")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The bytes of a calm run, and how many operations its segment asked of the disk."""
    folder = tmp_path_factory.mktemp("calm")
    training = Training(folder, "one", FAILING, SHORT)
    count = folder / "count"
    segment = training.start({"FAILING_RUN": str(training.run.path), "FAILING_COUNT": str(count)})
    assert segment.finish() == 0, "".join(segment.errors)
    return final_state(training.run), int(count.read_text())


@pytest.mark.timeout(1800)
def test_an_operation_that_fails_costs_no_byte(
    tmp_path: Path, calm: tuple[dict[str, bytes], int]
) -> None:
    expected, num_operations = calm
    assert num_operations > NUM_FAILURES
    codes = []
    for number in range(NUM_FAILURES):
        failing = 1 + number * num_operations // NUM_FAILURES
        training = Training(tmp_path / str(number), "one", FAILING, SHORT)
        segment = training.start(
            {"FAILING_RUN": str(training.run.path), "FAILING_AT": str(failing)}
        )
        codes.append(segment.finish())
        assert_told_in_words(segment, codes[-1], f"operation {failing}")
        check_latest_is_good(training.run)
        complete(training)
        assert differences(expected, final_state(training.run)) == [], failing
    assert {0, 1} >= set(codes)
    print(f"{codes.count(1)} of {len(codes)} ended the segment, the others were got over")


def assert_told_in_words(segment: Segment, code: int, what: str) -> None:
    told = "".join(segment.errors)
    assert code in (0, 1), f"{what}: exit code {code}\n{told}"
    assert "Traceback" not in told, f"{what}\n{told}"
    assert code == 0 or segment.errors[-1].startswith("error: "), f"{what}\n{told}"


PARTS: dict[str, Callable[[RunDirectory], Path]] = {
    "segments": lambda run: run.segments,
    "run.json": lambda run: run.run_json,
    "losses": lambda run: run.path / "losses",
    "logs": lambda run: run.path / "logs",
    "staging": lambda run: run.staging,
    "lease": lambda run: run.lease,
    "all checkpoints": lambda run: run.checkpoints,
    "newest checkpoint": lambda run: max(run.checkpoints.glob("step-*")),
    "all": lambda run: run.path,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_removed_while_it_trains_costs_no_byte(
    tmp_path: Path, calm: tuple[dict[str, bytes], int], part: str
) -> None:
    training = Training(tmp_path, "one", FAILING, (*SHORT, "logging.every_s=0.0001"))
    segment = training.start()
    while (event := segment.wait_for("progress")) is not None:
        if event["step"] == 14:
            break
    removed = PARTS[part](training.run)
    removed.unlink() if removed.is_file() else shutil.rmtree(removed, ignore_errors=True)
    assert_told_in_words(segment, segment.finish(), part)
    complete(training)
    found = final_state(training.run)
    # What selection could have chosen of checkpoints that somebody removed is gone.
    of_the_end = {name for name in calm[0] if not name.startswith("selectable")}
    assert [name for name in differences(calm[0], found) if name in of_the_end] == []


@contextmanager
def full(folder: Path) -> Iterator[None]:
    filling = folder / "filling"
    statistics = os.statvfs(folder)
    filling.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize))
    yield
    filling.unlink()


@pytest.mark.timeout(600)
def test_a_disk_that_is_full_in_any_stage_costs_no_byte(tmp_path: Path) -> None:
    overrides = (*SHORT, *QUICK_EXPORT)
    calm = Training(tmp_path / "calm", "one", FAILING, overrides)
    for name in STAGES:
        segment = calm.start(stage=name)
        assert segment.finish() == 0, "".join(segment.errors)
    disk = tmp_path / "disk"
    disk.mkdir()

    def act(folder: Path) -> None:
        # Started anew: what others are forked from does not see a disk that is mounted here.
        training = Training(folder, "one", FAILING, overrides, is_cold=True)
        for name in STAGES:
            with full(folder):
                segment = training.start(stage=name)
                code = segment.finish()
                assert_told_in_words(segment, code, name)
                assert code == 1, f"{name} needs no room"
                assert "free" in segment.errors[-1], segment.errors
            again = training.start(stage=name)
            assert again.finish() == 0, "".join(again.errors)
        assert differences(final_state(calm.run), final_state(training.run)) == []
        assert differences(files_of(calm.run.bundle), files_of(training.run.bundle)) in (
            [],
            ["manifest.json"],
        )

    on_a_small_disk(disk, act)
