"""The picture of the learning curves."""

from __future__ import annotations

import base64
from xml.etree import ElementTree

import pytest

from holdfast.tasks.learning_curves import data_uri, draw_learning_curves, round_ticks


def entry(step: int, train: float, validation: float) -> dict[str, object]:
    return {"step": step, "train_loss": train, "metrics": {"loss": validation}}


def test_each_curve_and_each_preemption_is_a_line() -> None:
    svg = draw_learning_curves([entry(10, 2.0, 2.1), entry(20, 1.0, 1.2)], [15])
    root = ElementTree.fromstring(svg)
    namespace = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{namespace}polyline")) == 2
    assert len(root.findall(f".//{namespace}title")) == 1


def test_values_that_are_not_finite_are_left_out() -> None:
    svg = draw_learning_curves([entry(1, float("nan"), 1.0), entry(2, 1.0, 1.0)], [])
    assert "nan" not in svg


def test_a_run_without_an_epoch_is_said_so() -> None:
    assert "no finished epoch" in draw_learning_curves([], [])


def test_the_picture_needs_no_server() -> None:
    uri = data_uri("<svg/>")
    assert base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")) == b"<svg/>"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 510.0, [0, 100, 200, 300, 400, 500, 600]),
        (0.013, 2.12, [0, 0.5, 1, 1.5, 2, 2.5]),
        (3.0, 3.0, [3, 3.5]),
        (0.0, 0.0, [0, 0.2]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_axes_are_marked_with_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)
