"""The ledger: what the time of a run went to."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.runs.directory import SegmentRecord
from holdfast.training.runs.ledger import ledger


def moment(at_s: float) -> str:
    return datetime.fromtimestamp(1_800_000_000 + at_s, UTC).isoformat()


def segment(
    number: int,
    steps: tuple[int, int],
    lived_s: tuple[float, float | None],
    **costs_s: float,
) -> SegmentRecord:
    begin_s, end_s = lived_s
    return SegmentRecord(
        number=number,
        started_at=moment(begin_s + costs_s.get("startup", 0.0)),
        ended_at=None if end_s is None else moment(end_s),
        start_step=steps[0],
        end_step=steps[1],
        costs_s=costs_s,
        host="here",
        pid=1,
    )


def test_a_run_without_segments_has_an_empty_ledger() -> None:
    assert ledger([]).total_s == 0
    assert ledger([]).goodput == 0


def test_an_uninterrupted_run_starts_works_and_saves() -> None:
    found = ledger([segment(1, (0, 100), (0, 60), startup=4, restore=1, saving=5)])
    assert found.starting_s == 5
    assert found.saving_s == 5
    assert found.useful_s == pytest.approx(50)
    assert (found.restarting_s, found.waiting_s, found.recomputed_s) == (0, 0, 0)
    assert found.goodput == pytest.approx(50 / 60)


def test_steps_that_are_done_again_are_recomputed_time() -> None:
    found = ledger(
        [
            segment(1, (0, 100), (0, None), startup=2, useful=50),
            segment(2, (80, 180), (62, 114), startup=2),
        ]
    )
    assert found.num_recomputed_steps == 20
    assert found.recomputed_s == pytest.approx(10)
    assert found.useful_s == pytest.approx(50 + 40)


def test_waiting_is_the_time_between_lives_and_is_not_paid_for() -> None:
    found = ledger(
        [
            segment(1, (0, 10), (0, 20), startup=2),
            segment(2, (10, 20), (50, 70), startup=3, restore=1),
        ]
    )
    assert found.waiting_s == pytest.approx(30)
    assert found.restarting_s == pytest.approx(4)
    assert found.paid_s == pytest.approx(40)
    assert found.total_s == pytest.approx(70)


def test_the_table_names_each_kind_of_time_and_the_goodput() -> None:
    table = ledger([segment(1, (0, 10), (0, 20), startup=2)]).as_table()
    for word in ("useful", "recomputed", "saving", "restarting", "waiting", "goodput 90.0%"):
        assert word in table


@given(
    st.lists(
        st.tuples(
            st.integers(0, 50),
            st.integers(0, 50),
            st.floats(0, 100),
            st.floats(0, 100),
            st.booleans(),
        ),
        max_size=8,
    )
)
def test_all_time_from_first_to_last_is_accounted_for(
    lives: list[tuple[int, int, float, float, bool]],
) -> None:
    records, now_s, step = [], 0.0, 0
    for number, (lost, done, lived_s, gap_s, is_killed) in enumerate(lives, 1):
        start = max(0, step - lost)
        step = start + done
        end_s = None if is_killed else now_s + lived_s
        records.append(segment(number, (start, step), (now_s, end_s), useful=lived_s))
        now_s += lived_s + gap_s
    found = ledger(records)
    last_gap_s = lives[-1][3] if lives else 0.0
    assert found.total_s == pytest.approx(now_s - last_gap_s, abs=1e-3)
    assert found.useful_s >= -1e-6
    assert 0 <= found.goodput <= 1 + 1e-6
