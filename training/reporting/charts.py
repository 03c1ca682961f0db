"""Charts over two axes as inline SVG: lines, with marks and bands where something happened.

Every chart is drawn about 400 units wide and is shown at about that size, several side by side
where the page is wide; so its text has one size at every width. Colours come from the page's style.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from holdfast.training.reporting.axes import Axis, fitted, tick_label
from holdfast.training.reporting.markup import VARIES, Html, element, joined, text

WIDTH, HEIGHT = 400, 216
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 14, 34
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A line of a chart. ``role``: ``main``, ``second`` or ``quiet``, told apart without colour."""

    name: str
    points: Points
    role: str = "main"


@dataclass(frozen=True)
class Mark:
    """Something that happened at an x: a stop of a segment. ``kind`` is a class of the style."""

    x: float
    sign: str
    words: str
    kind: str = "stop"


@dataclass(frozen=True)
class Band:
    """A stretch of x that means something, e.g. steps that were done twice."""

    start: float
    end: float
    words: str
    kind: str = "lost"


@dataclass(frozen=True)
class Ring:
    """One point that stands out; the legend says what it is."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class LineChart:
    """A chart. ``key`` is unique on the page; ``description`` says what the lines say."""

    key: str
    title: str
    description: str
    x_label: str
    lines: Sequence[Line]
    rings: Sequence[Ring] = ()
    marks: Sequence[Mark] = ()
    bands: Sequence[Band] = ()
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    may_log: bool = False
    size: tuple[int, int] = (WIDTH, HEIGHT)
    has_legend: bool = True
    varies: bool = False

    def drawn(self) -> Html:
        """The chart with its caption and legend."""
        x, y = self._axes()
        height = self.size[1]
        shapes = [grid(x, y, self.x_label, height)]
        happened = [_band(band, x, height) for band in self.bands]
        happened += [_mark(mark, x, height) for mark in self.marks]
        if happened:
            shapes.append(Html(f"<g {VARIES}>{joined(happened)}</g>"))
        shapes += [_line(line, x, y) for line in self.lines]
        shapes += [_ring(ring, x, y) for ring in self.rings]
        picture = svg(self.key, self.title, self.description, self.size, joined(shapes))
        legend = [_legend(line) for line in self.lines] if self.has_legend else []
        legend += [_ring_legend(ring) for ring in self.rings]
        scale = "logarithmic scale" if y.is_log else ""
        return figure(self.title, legend, picture, scale, varies=self.varies)

    def _axes(self) -> tuple[Axis, Axis]:
        every = [point for line in self.lines for point in line.points]
        xs = self.x_range or (min(x for x, _ in every), max(x for x, _ in every))
        bottom, top = self.size[1] - BOTTOM, TOP
        x = Axis(*xs, LEFT, self.size[0] - RIGHT)
        if self.y_range is not None:
            return x, Axis(*self.y_range, bottom, top)
        return x, fitted([y for _, y in every], bottom, top, may_log=self.may_log)


def svg(key: str, title: str, description: str, size: tuple[float, float], content: Html) -> Html:
    """An SVG that says in words what it shows."""
    return Html(
        f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc"><title id="{key}-title">{escape(title)}</title>'
        f'<desc id="{key}-desc">{escape(description)}</desc>{content}</svg>'
    )


def figure(
    title: str, legend: Sequence[Html], picture: Html, remark: str = "", *, varies: bool = False
) -> Html:
    """A picture under its title and legend."""
    notes = element("span", text(remark), "remark") if remark else Html("")
    head = element("span", text(title), "title") + notes + joined(legend)
    return element("figure", Html(element("figcaption", Html(head)) + picture), varies=varies)


def grid(x: Axis, y: Axis, x_label: str, height: float) -> Html:
    """Thin lines at the round values of y, and values along both axes."""
    parts = []
    y_ticks, x_ticks = y.ticks(), x.ticks(5)
    for tick in y_ticks:
        place = y.at(tick)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{place}" y2="{place}"/>')
        parts.append(label(x.start - 6, place + 3.5, tick_label(tick, y_ticks), "end"))
    for tick in x_ticks:
        words = tick_label(tick, x_ticks)
        parts.append(label(x.at(tick), height - BOTTOM + 14, words, "middle"))
    parts.append(label(x.end, height - 4, x_label, "end", "axis"))
    return Html("".join(parts))


def label(x: float, y: float, words: str, anchor: str = "start", class_name: str = "") -> Html:
    """Text in a drawing."""
    kind = f' class="{class_name}"' if class_name else ""
    side = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return Html(f'<text x="{round(x, 1)}" y="{round(y, 1)}"{side}{kind}>{escape(words)}</text>')


def _line(line: Line, x: Axis, y: Axis) -> Html:
    places = [(x.at(px), y.at(py)) for px, py in line.points]
    if len(places) == 1:
        ((cx, cy),) = places
        return Html(f'<circle class="dot {line.role}" cx="{cx}" cy="{cy}" r="3"/>')
    path = " ".join(f"{px},{py}" for px, py in places)
    return Html(f'<polyline class="line {line.role}" points="{path}"/>')


def _ring(ring: Ring, x: Axis, y: Axis) -> Html:
    place = f'cx="{x.at(ring.x)}" cy="{y.at(ring.y)}"'
    return Html(f'<circle class="ring" {place} r="4"><title>{escape(ring.words)}</title></circle>')


def _mark(mark: Mark, x: Axis, height: float) -> Html:
    place = x.at(mark.x)
    return Html(
        f'<g class="mark {mark.kind}"><title>{escape(mark.words)}</title>'
        f'<line x1="{place}" x2="{place}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        f"{label(place, TOP - 4, mark.sign, 'middle')}</g>"
    )


def _band(band: Band, x: Axis, height: float) -> Html:
    start, end = x.at(band.start), x.at(band.end)
    return Html(
        f'<rect class="band {band.kind}" x="{start}" y="{TOP}" width="{max(0.8, end - start):.1f}" '
        f'height="{height - BOTTOM - TOP}"><title>{escape(band.words)}</title></rect>'
    )


def _legend(line: Line) -> Html:
    sample = f'<svg class="sample" viewBox="0 0 22 8" aria-hidden="true">{_sample(line.role)}</svg>'
    return element("span", Html(f"{sample}{text(line.name)}"), "legend")


def _ring_legend(ring: Ring) -> Html:
    sample = '<circle class="ring" cx="4" cy="4" r="3"/>'
    picture = f'<svg class="sample dot" viewBox="0 0 8 8" aria-hidden="true">{sample}</svg>'
    return element("span", Html(f"{picture}{text(ring.words)}"), "legend")


def _sample(role: str) -> str:
    return f'<polyline class="line {role}" points="1,4 21,4"/>'
