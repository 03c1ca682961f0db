"""Numbers, scales and tables of the report."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.reporting.axes import Axis, fitted, tick_label
from holdfast.training.reporting.markup import Column, table
from holdfast.training.reporting.wording import duration, number, signed

VALUES = st.floats(-1e9, 1e9).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.lists(VALUES, min_size=1, max_size=20), st.booleans())
def test_all_values_lie_on_their_axis_with_round_ticks(values: list[float], may_log: bool) -> None:
    axis = fitted(values, 0, 100, may_log=may_log)
    assert all(0 <= axis.at(value) <= 100 for value in values)
    ticks = axis.ticks()
    assert len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(-0.1 <= axis.at(tick) <= 100.1 for tick in ticks)
    assert len({tick_label(tick, ticks) for tick in ticks}) == len(ticks)


def test_close_ticks_of_large_numbers_keep_the_digits_that_tell_them_apart() -> None:
    ticks = fitted([-998107144.0, -999892858.0], 0, 100).ticks()
    assert [tick_label(tick, ticks) for tick in ticks] == [
        "\u22121e9",
        "\u22129.995e8",
        "\u22129.99e8",
        "\u22129.985e8",
    ]


def test_what_is_never_negative_has_no_axis_below_zero() -> None:
    assert fitted([0.0, 1.0], 0, 1).low == 0


def test_values_over_several_decades_get_a_logarithmic_axis() -> None:
    axis = fitted([0.01, 3.0], 0, 100, may_log=True)
    assert axis.is_log
    assert [tick_label(tick, axis.ticks()) for tick in axis.ticks()] == [
        "0.01",
        "0.03",
        "0.1",
        "0.3",
        "1",
        "3",
    ]
    assert not fitted([0.0, 3.0], 0, 100, may_log=True).is_log


def test_ticks_are_round_numbers() -> None:
    assert Axis(0, 510, 0, 100).ticks(5) == [0, 200, 400]
    assert Axis(0.0, 0.35, 0, 100).ticks(4) == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0133690, "0.01337"),
        (12.3456, "12.35"),
        (1234567.0, "1\u202f234\u202f567"),
        (-0.5, "\u22120.5000"),
        (None, "\u2013"),
        (float("nan"), "\u2013"),
        (2.5e-12, "2.5e\u221212"),
        (0.0, "0"),
    ],
)
def test_numbers_have_four_digits_and_real_signs(value: float | None, words: str) -> None:
    assert number(value) == words


def test_a_difference_shows_its_sign() -> None:
    assert [signed(value, 1) for value in (0.5, -0.5, 0.0)] == ["+0.5", "\u22120.5", "0.0"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.25, "0.2 s"), (59.96, "60.0 s"), (61, "1 min 1 s"), (7500, "2 h 5 min"), (9e4, "1 d 1 h")],
)
def test_times_are_told_in_their_two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_figures_of_a_column_have_the_same_decimals() -> None:
    drawn = table([Column("loss", [0.5, 0.0133, None]), Column("name", ["a<b", "c", "d"])])
    assert '<td class="number">0.5000</td>' in drawn
    assert '<td class="number">0.0133</td>' in drawn
    assert "a&lt;b" in drawn
