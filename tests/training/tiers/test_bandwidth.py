"""What fits into a grace period, how often is saved where it does not, and the limit of uploads."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

import pytest

from holdfast.training.errors import InputError
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.storage.address import Address
from holdfast.training.tiers.bandwidth import (
    LIMIT_VARIABLE,
    LOOK_EVERY_S,
    Throttle,
    UploadPace,
    asked_limit,
    fitting_bytes,
    known_bandwidth,
    note_bandwidth,
)
from holdfast.training.tiers.scratch import store_folder, tier_folder

ADDRESS = Address("s3", "runs", "team")
GRACE_S = 30.0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("HOLDFAST_SCRATCH", str(tmp_path))
    run = RunDirectory(tier_folder(ADDRESS, "work") / "digits" / "first")
    run.checkpoint(10).mkdir(parents=True)
    (run.checkpoint(10) / "model.safetensors").write_bytes(bytes(1000))
    return run


def test_a_state_that_fits_changes_nothing(run: RunDirectory) -> None:
    note_bandwidth(ADDRESS, 1000 / (GRACE_S - 6.0) + 1)
    pace = UploadPace(run, GRACE_S)
    pace.note_saved(10)
    assert pace.upload_s == math.inf


def test_one_that_does_not_fit_goes_up_as_often_as_it_can_and_that_is_said_once(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    pace = UploadPace(run, GRACE_S, clock=lambda: now[0])
    pace.note_saved(10)
    assert pace.upload_s == math.inf  # nothing was measured
    note_bandwidth(ADDRESS, 20.0)
    assert pace.upload_s == math.inf  # not looked at each time
    now[0] += LOOK_EVERY_S
    with caplog.at_level(logging.WARNING):
        assert [pace.upload_s, pace.upload_s] == [50.0, 50.0]
    [record] = caplog.records
    told = record.getMessage()
    assert "s3://runs/team takes" in told
    assert "a checkpoint has" in told
    assert "which takes 50 s" in told


def test_what_was_measured_before_is_said_when_a_run_starts(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    note_bandwidth(ADDRESS, 100 * 2**20)
    with caplog.at_level(logging.INFO):
        UploadPace(run, GRACE_S)
    assert "100.0 MiB/s; a grace period of 30 s is enough for 2.3 GiB" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", '{"bytes_per_s": -1.0}', '{"bytes_per_s": "x"}'])
def test_a_measurement_that_cannot_be_read_is_none(content: str, run: RunDirectory) -> None:
    (store_folder(ADDRESS) / "bandwidth.json").write_text(content)
    assert known_bandwidth(ADDRESS) is None
    assert UploadPace(run, GRACE_S).upload_s == math.inf


def test_a_run_in_a_folder_has_no_pace(tmp_path: Path) -> None:
    pace = UploadPace(RunDirectory(tmp_path / "runs" / "digits" / "first"), 0.1)
    pace.note_saved(10)
    assert pace.upload_s == math.inf


def test_a_grace_period_that_is_shorter_than_its_margin_fits_nothing() -> None:
    assert fitting_bytes(1e9, 3.0) == 0.0


def test_senders_stay_below_the_limit_together_until_it_is_lifted() -> None:
    throttle = Throttle(1000.0)
    start_s = time.monotonic()
    threads = [threading.Thread(target=throttle.take, args=(100,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.3 <= time.monotonic() - start_s < 5.0
    throttle.take(10**9)  # what comes next waits for long
    waiting = threading.Thread(target=throttle.take, args=(1,))
    waiting.start()
    throttle.lift()
    waiting.join(10.0)
    assert not waiting.is_alive()


def test_what_need_not_be_sent_any_more_waits_no_longer_and_takes_nothing_from_others() -> None:
    throttle, is_over = Throttle(1000.0), threading.Event()
    throttle.take(1000)
    waiting = threading.Thread(target=throttle.take, args=(10**9, is_over.is_set))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    is_over.set()
    waiting.join(10.0)
    assert not waiting.is_alive()
    start_s = time.monotonic()
    throttle.take(1)
    assert time.monotonic() - start_s < 5.0


def test_the_limit_is_asked_for_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    assert asked_limit().bytes_per_s == math.inf
    monkeypatch.setenv(LIMIT_VARIABLE, "2.5")
    assert asked_limit().bytes_per_s == 2.5e6
    for wrong in ("fast", "0", "-1", "nan"):
        monkeypatch.setenv(LIMIT_VARIABLE, wrong)
        with pytest.raises(InputError, match="expected a number above 0"):
            asked_limit()
