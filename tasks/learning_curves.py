"""Learning curves as an SVG picture, from the history that the newest checkpoint holds."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 28, 36
COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777")
Point = tuple[float, float]


def draw_learning_curves(history: Sequence[dict[str, Any]], preempted_steps: Sequence[int]) -> str:
    """Training and validation loss over steps; a dashed line where a segment was preempted.

    Args:
        history: one entry per epoch with ``step``, ``train_loss`` and ``metrics``.
        preempted_steps: where segments ended.

    Returns:
        An SVG document that reads on light and dark grounds.
    """
    curves = {
        "training loss": _points(history, lambda entry: entry.get("train_loss")),
        "validation loss": _points(history, lambda entry: entry.get("metrics", {}).get("loss")),
    }
    curves = {name: points for name, points in curves.items() if points}
    every = [point for points in curves.values() for point in points]
    if not every:
        return _document('<text x="24" y="40">no finished epoch yet</text>')
    x_ticks = round_ticks(0.0, max(x for x, _ in every))
    y_ticks = round_ticks(min(y for _, y in every), max(y for _, y in every))
    x_range, y_range = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])
    parts = [_axes(x_ticks, y_ticks)]
    parts += [_notice_line(_scaled(float(s), x_range, True)) for s in preempted_steps]
    for number, (name, points) in enumerate(curves.items()):
        path = " ".join(
            f"{_scaled(x, x_range, True)},{_scaled(y, y_range, False)}" for x, y in points
        )
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_legend(name, colour, number))
    return _document("".join(parts))


def data_uri(svg: str) -> str:
    """The picture as an address that needs no server."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _points(history: Sequence[dict[str, Any]], value_of: Any) -> list[Point]:
    pairs = [(entry.get("step"), value_of(entry)) for entry in history]
    return [
        (float(step), float(value))
        for step, value in pairs
        if step is not None and value is not None and math.isfinite(value)
    ]


def round_ticks(low: float, high: float) -> list[float]:
    """Four to eight equally spaced numbers of few digits, around all values from low to high."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _scaled(value: float, bounds: tuple[float, float], is_x: bool) -> float:
    low, high = bounds
    part = (value - low) / (high - low) if high > low else 0.5
    place = (
        LEFT + part * (WIDTH - LEFT - RIGHT)
        if is_x
        else HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)
    )
    return round(place, 1)


def _axes(x_ticks: Sequence[float], y_ticks: Sequence[float]) -> str:
    parts = []
    for y in y_ticks:
        place = _scaled(y, (y_ticks[0], y_ticks[-1]), False)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}" stroke="#8884"/>'
            f'<text x="{LEFT - 8}" y="{place + 4}" text-anchor="end">{y:.4g}</text>'
        )
    for x in x_ticks:
        place = _scaled(x, (x_ticks[0], x_ticks[-1]), True)
        parts.append(f'<text x="{place}" y="{HEIGHT - 18}" text-anchor="middle">{x:,.0f}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
    return "".join(parts)


def _notice_line(x: float) -> str:
    return (
        f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#dc2626" '
        f'stroke-dasharray="4 3"><title>preempted</title></line>'
    )


def _legend(name: str, colour: str, number: int) -> str:
    x = LEFT + 150 * number
    return (
        f'<rect x="{x}" y="10" width="14" height="4" fill="{colour}"/>'
        f'<text x="{x + 20}" y="16">{escape(name)}</text>'
    )


def _document(body: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="#777" role="img" aria-label="learning curves">{body}</svg>'
    )
