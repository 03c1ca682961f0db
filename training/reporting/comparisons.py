"""Charts that compare: dots with whiskers, a confusion matrix, what was made from which steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from holdfast.training.reporting.axes import Axis, fitted, tick_label
from holdfast.training.reporting.charts import WIDTH, figure, label, svg
from holdfast.training.reporting.facts import Estimate
from holdfast.training.reporting.figures import Confusion
from holdfast.training.reporting.markup import Html, joined

ROW, HEAD, FOOT = 26, 8, 36
LARGEST_CELL, MAX_CLASS_CHARS = 56.0, 5
CHAR_WIDTH, MAX_NAME_CHARS = 6.9, 24


@dataclass(frozen=True)
class DotRow:
    """One row: a name, a figure with its limits, and how it is drawn.

    ``role``: ``main`` (filled) or ``plain`` (hollow).
    """

    name: str
    estimate: Estimate
    role: str = "plain"


@dataclass(frozen=True)
class DotChart:
    """Figures of several things on one scale. ``zero``: draw a line at zero, and keep it in."""

    key: str
    title: str
    description: str
    rows: Sequence[DotRow]
    x_label: str
    zero: bool = False

    def drawn(self) -> Html:
        """The chart with its caption."""
        left = _name_width([row.name for row in self.rows])
        height = HEAD + ROW * len(self.rows) + FOOT
        x = self._axis(left)
        bottom = HEAD + ROW * len(self.rows)
        parts = [_vertical_grid(x, bottom)]
        if self.zero:
            place = x.at(0.0)
            ends = f'x1="{place}" x2="{place}" y1="{HEAD}" y2="{bottom}"'
            parts.append(Html(f'<line class="zero" {ends}/>'))
        for number, row in enumerate(self.rows):
            parts.append(_dot_row(row, x, HEAD + ROW * (number + 0.5)))
        parts.append(label(x.end, height - 4, self.x_label, "end", "axis"))
        picture = svg(self.key, self.title, self.description, (WIDTH, height), Html("".join(parts)))
        return figure(self.title, (), picture)

    def _axis(self, left: float) -> Axis:
        values = [0.0] if self.zero else []
        for row in self.rows:
            one = row.estimate
            values += [v for v in (one.value, one.low, one.high) if v is not None]
        return fitted(values, left, WIDTH - 14)


@dataclass(frozen=True)
class SourceChart:
    """Which steps each candidate was made from."""

    key: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[int], bool]]
    num_steps: int

    def drawn(self) -> Html:
        """The chart: a dot for each checkpoint, the champion's filled."""
        left = _name_width([name for name, _, _ in self.rows])
        bottom = HEAD + ROW * len(self.rows)
        height = bottom + FOOT
        x = Axis(0, max(1, self.num_steps), left, WIDTH - 14)
        parts = [_vertical_grid(x, bottom)]
        for number, (name, steps, is_champion) in enumerate(self.rows):
            y = HEAD + ROW * (number + 0.5)
            parts.append(_row_name(name, y, is_main=is_champion))
            role = "main" if is_champion else "plain"
            places = [x.at(step) for step in steps]
            if len(places) > 1:
                ends = f'x1="{places[0]}" x2="{places[-1]}" y1="{y}" y2="{y}"'
                parts.append(Html(f'<line class="whisker {role}" {ends}/>'))
            parts += [_dot(place, y, role) for place in places]
        parts.append(label(x.end, height - 4, "step", "end", "axis"))
        picture = svg(self.key, self.title, self.description, (WIDTH, height), Html("".join(parts)))
        return figure(self.title, (), picture)


def confusion_chart(key: str, confusion: Confusion) -> Html:
    """The matrix: rows are true classes, columns predicted ones; each cell has its count."""
    num = len(confusion.class_names)
    left, top, right, bottom = 46.0, 20.0, 6.0, 24.0
    size = min(LARGEST_CELL, (WIDTH - left - right) / num)
    parts = []
    for true, row in enumerate(confusion.counts):
        y = top + size * true
        name = _shortened(confusion.class_names[true], MAX_CLASS_CHARS)
        parts.append(label(left - 8, y + size / 2 + 4, name, "end"))
        parts.append(label(left + size * (true + 0.5), top - 7, name, "middle"))
        for predicted, count in enumerate(row):
            place = (left + size * predicted, y, size)
            share = count / max(1, sum(row))
            parts.append(_cell(place, count, share, is_right=predicted == true))
    height = top + size * num + bottom
    parts.append(label(left + size * num, height - 6, "predicted", "end", "axis"))
    parts.append(label(left - 8, height - 6, "true", "end", "axis"))
    total, right_ones = (
        sum(map(sum, confusion.counts)),
        sum(row[number] for number, row in enumerate(confusion.counts)),
    )
    description = f"{right_ones} of {total} are on the diagonal, which is right."
    picture = svg(key, confusion.title, description, (WIDTH, round(height)), Html("".join(parts)))
    return figure(confusion.title, (), picture, confusion.data)


def _cell(place: tuple[float, float, float], count: int, share: float, *, is_right: bool) -> Html:
    x, y, size = place
    kind = "right" if is_right else "wrong"
    # Even one mistake among hundreds has to be seen.
    depth = 0.0 if count == 0 else (0.08 + 0.72 * share if is_right else 0.3 + 0.7 * share)
    shown = f"{depth:.2f}" if count else "0"
    box = (
        f'<rect class="{kind}" x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{size - 1:.1f}" '
        f'height="{size - 1:.1f}" fill-opacity="{shown}"/>'
    )
    if not count:
        return Html(box)
    kind = "deep" if depth > 0.55 else "shallow"
    return Html(box + label(x + size / 2, y + size / 2 + 4, str(count), "middle", kind))


def _dot_row(row: DotRow, x: Axis, y: float) -> Html:
    one, parts = row.estimate, [_row_name(row.name, y, is_main=row.role == "main")]
    if one.low is not None and one.high is not None:
        low, high = x.at(one.low), x.at(one.high)
        ends = "".join(f"M{end} {y - 4}v8" for end in (low, high))
        parts.append(Html(f'<path class="whisker {row.role}" d="M{low} {y}H{high}{ends}"/>'))
    parts.append(_dot(x.at(one.value), y, row.role))
    return joined(parts)


def _dot(x: float, y: float, role: str) -> Html:
    return Html(f'<circle class="dot {role}" cx="{x}" cy="{y}" r="4"/>')


def _row_name(name: str, y: float, *, is_main: bool) -> Html:
    shown = _shortened(name, MAX_NAME_CHARS)
    kind = ' class="strong"' if is_main else ""
    title = f"<title>{escape(name)}</title>" if shown != name else ""
    return Html(f'<text x="0" y="{y + 4}"{kind}>{title}{escape(shown)}</text>')


def _vertical_grid(x: Axis, bottom: float) -> Html:
    ticks, parts = x.ticks(4), []
    for tick in ticks:
        place, words = x.at(tick), tick_label(tick, ticks)
        ends = f'x1="{place}" x2="{place}" y1="{HEAD}" y2="{bottom}"'
        parts.append(f'<line class="grid" {ends}/>{label(place, bottom + 14, words, "middle")}')
    return Html("".join(parts))


def _shortened(name: str, max_chars: int) -> str:
    return name if len(name) <= max_chars else name[: max_chars - 1] + "\u2026"


def _name_width(names: Sequence[str]) -> float:
    longest = max((min(len(name), MAX_NAME_CHARS) for name in names), default=0)
    return round(longest * CHAR_WIDTH) + 14
