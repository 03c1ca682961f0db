"""Losses of steps that are done twice are held against each other."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from holdfast.flows.command_line.group import holdfast
from holdfast.training.errors import InexactError
from holdfast.training.exactness.strictness import strictness
from holdfast.training.loop.loss_record import LossRecord
from holdfast.training.runs.directory import (
    RunRecord,
    SegmentRecord,
    TakenOver,
    read_segments,
    utc_now,
    write_segment,
)
from holdfast.training.runs.durable_json import write_json_durably
from holdfast.training.runs.ledger import ledger
from holdfast.training.runs.losses import (
    ComparedLosses,
    bits_of,
    compare_losses,
    loss_of,
    with_known_ends,
)
from holdfast.training.runs.paths import RunDirectory


def segment(run: RunDirectory, number: int, start_step: int, losses: Sequence[float]) -> None:
    record = LossRecord(run, number, start_step)
    for loss in losses:
        record.add(torch.tensor(loss))
    record.close()


@pytest.mark.parametrize("value", [0.1, -0.0, math.inf, -math.nan, 5e-324, 1e308])
def test_bits_name_a_loss(value: float) -> None:
    assert struct.pack("<d", loss_of(bits_of(value))) == struct.pack("<d", value)


def test_a_step_is_compared_with_the_newest_segment_that_did_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    segment(run, 1, 0, [1, 2, 3, 4, 5])
    segment(run, 2, 3, [4, 5, 6, 7])
    segment(run, 3, 2, [3, 4, 5, 6])
    segment(run, 4, 6, [7, 8])
    found = compare_losses(run)
    assert (found.num_compared, found.num_different) == (2 + 4 + 1, 0)
    assert found.told(8) == "8 steps were done twice, 7 compared, all with the same bits"
    assert ComparedLosses().told(1) == "1 step was done twice, 0 compared"
    assert ComparedLosses().told(0) == "no step was done twice"


def test_another_bit_is_told_at_once_with_step_and_segment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    other = struct.unpack("<f", struct.pack("<I", struct.unpack("<I", b"\0\0@@")[0] + 1))[0]
    segment(run, 1, 0, [1, 2, 3, math.nan])
    segment(run, 2, 1, [2, other, math.nan])
    assert "step 3 was done again in segment 2 and had the loss 3.00000" in caplog.text
    found = compare_losses(run)
    assert (found.num_compared, found.num_different) == (3, 1)
    assert found.differences[0].step == 3
    with strictness(True), pytest.raises(InexactError, match="step 2 was done again in segment 3"):
        segment(run, 3, 1, [2.5])


def test_what_a_killed_process_had_not_written_is_not_compared(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    segment(run, 1, 0, [1, 2, 3, 4])
    (file,) = run.losses.iterdir()
    os.truncate(file, 2 * 8 + 3)
    segment(run, 2, 1, [2, 3, 4])
    assert compare_losses(run).num_compared == 1


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    segment(run, 1, 0, [1, 2])
    os.mkfifo(run.losses / "0002-00000001.f64")
    (run.losses / "0003-00000001.f64").symlink_to("/dev/zero")
    (run.losses / "notes.txt").write_text("mine")
    assert compare_losses(run).num_compared == 0


def test_a_store_that_cannot_be_written_is_told_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path)
    run.losses.write_text("a file where the folder should be")
    record = LossRecord(run, 1, 0)
    for _ in range(3):
        record.add(torch.tensor(1.0))
        record.flush()
    record.close()
    assert [line.levelname for line in caplog.records] == ["WARNING"]


def begun(run: RunDirectory, **changed: object) -> None:
    record = RunRecord(
        run_id="one", experiment="points", config={}, config_digest="b", created_at=utc_now()
    ).model_copy(update=changed)
    run.path.mkdir(exist_ok=True)
    write_json_durably(run.run_json, record.model_dump(mode="json"))


def test_losses_of_another_configuration_are_not_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDirectory(tmp_path / "one")
    taken = TakenOver(segment=3, step=2, at=utc_now(), config_digest="a", changed={"rate": 1})
    begun(run, taken_over=[taken])
    segment(run, 1, 0, [1, 2, 3, 4])
    segment(run, 2, 1, [2, 3, 4])
    segment(run, 3, 2, [30, 40, 50])
    segment(run, 4, 3, [40, 50])
    found = compare_losses(run)
    assert (found.num_compared, found.num_different) == (3 + 2, 0)
    assert caplog.text == ""


def test_a_killed_segment_is_known_to_have_done_each_step_whose_loss_was_kept(
    tmp_path: Path,
) -> None:
    run = RunDirectory(tmp_path / "one")
    begun(run)
    for number, start, noted in ((1, 0, 2), (2, 1, 3)):
        made = SegmentRecord(
            number=number, started_at=utc_now(), start_step=start, end_step=noted, host="h", pid=1
        )
        write_segment(run, made)
    segment(run, 1, 0, [1, 2, 3, 4, 5])
    segment(run, 2, 1, [2, 3, 4])
    ends = [record.end_step for record in with_known_ends(read_segments(run), run)]
    assert ends == [5, 4]
    repeated = ledger(with_known_ends(read_segments(run), run)).num_recomputed_steps
    assert repeated == compare_losses(run).num_compared == 3
    told = CliRunner().invoke(holdfast, ["status", str(run.path), "--json"]).output
    assert json.loads(told)["num_repeated_steps"] == 3
    page = CliRunner().invoke(holdfast, ["status", str(run.path)]).output
    assert "3 steps were done twice, 3 compared, all with the same bits" in page
