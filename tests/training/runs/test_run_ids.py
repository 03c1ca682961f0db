"""Run ids from templates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from holdfast.training.errors import InputError
from holdfast.training.runs.run_ids import fill_run_id

START = datetime(2026, 1, 31, 3, 0, 5, tzinfo=UTC)


def test_a_night_is_named_by_its_scheduled_start() -> None:
    assert fill_run_id("nightly-{time}", experiment="digits", start=START) == (
        "nightly-20260131-030005"
    )


def test_the_zone_of_the_start_does_not_matter() -> None:
    elsewhere = START.astimezone(timezone(timedelta(hours=9)))
    names = {fill_run_id("{date}", experiment="d", start=start) for start in (START, elsewhere)}
    assert names == {"2026-01-31"}


def test_a_name_without_placeholders_stays() -> None:
    assert fill_run_id("first", experiment="digits", start=START) == "first"


@pytest.mark.parametrize("template", ["{night}", "a/{date}", "", "../x"])
def test_what_cannot_be_a_name_is_refused(template: str) -> None:
    with pytest.raises(InputError):
        fill_run_id(template, experiment="digits", start=START)
