"""However late the store, the server and the machines are: no run is doubled, none is stranded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

from holdfast.training.runs.lease import Lease
from tests.flows.driven_rescue import Found, Trial


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def played(folder: Path, num_trials: int) -> list[Found]:
    return [Trial(folder / str(seed), seed).play() for seed in range(num_trials)]


@pytest.mark.parametrize("num_trials", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_run_is_doubled_and_none_is_stranded(num_trials: int, tmp_path: Path) -> None:
    found = played(tmp_path, num_trials)
    assert sum(one.num_doubled for one in found) == 0
    assert sum(one.num_stranded for one in found) == 0
    notices_s = [seconds for one in found for seconds in one.notices_s]
    assert len(notices_s) > num_trials / 2
    assert median(notices_s) < 10.0


@pytest.mark.slow
def test_a_lease_that_fences_nobody_off_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lease, "_fence_others", lambda _: None)
    assert sum(one.num_doubled for one in played(tmp_path, 25)) > 0
