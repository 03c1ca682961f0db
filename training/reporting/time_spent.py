"""What the time of the run went to, and its segments one by one."""

from __future__ import annotations

from html import escape

from holdfast.training.reporting.charts import Band, Line, LineChart
from holdfast.training.reporting.facts import RunFacts, SegmentFacts
from holdfast.training.reporting.learning import stops
from holdfast.training.reporting.markup import (
    Column,
    Html,
    element,
    joined,
    note,
    section,
    table,
    text,
)
from holdfast.training.reporting.wording import duration, percent
from holdfast.training.runs.ledger import Ledger

KINDS = {
    "useful": "steps that count, and validation",
    "recomputed": "steps that had been done before and were lost",
    "saving": "training stood still for a checkpoint",
    "starting": "the first segment's start",
    "restarting": "start and restore of the later segments",
    "waiting": "nobody trained",
}


def time_section(facts: RunFacts) -> Html:
    """A bar and a table of the time, progress over the clock, and the segments."""
    if not facts.segments:
        return section("Time", note("No segment has run yet."), varies=True)
    found = facts.ledger
    lead = (
        f"Goodput {percent(found.goodput)}: useful time divided by the time in which a segment "
        f"lived. {facts.losses.told(found.num_recomputed_steps).capitalize()}."
    )
    if facts.money is not None:
        lead += f" Money: {facts.money.told()}."
    if facts.certificate is not None:
        lead += f" Certificate of holdfast verify-resume: {facts.certificate.told()}."
    charts = element("div", joined([_progress(facts), _spent_table(found)]), "charts")
    content = Html(_bar(found) + charts + _segments(facts.segments))
    return section("Time", content, lead, varies=True)


def _seconds(found: Ledger, kind: str) -> float:
    seconds: float = getattr(found, f"{kind}_s")
    return seconds


def _bar(found: Ledger) -> Html:
    parts = [
        Html(
            f'<span class="{kind}" style="flex:{_seconds(found, kind):.3f} 0 0" '
            f'title="{escape(f"{kind}: {duration(_seconds(found, kind))}")}"></span>'
        )
        for kind in KINDS
        if _seconds(found, kind) > 0
    ]
    told = ", ".join(f"{kind} {duration(_seconds(found, kind))}" for kind in KINDS)
    return Html(f'<div class="bar" role="img" aria-label="{escape(told)}">{joined(parts)}</div>')


def _spent_table(found: Ledger) -> Html:
    seconds = [_seconds(found, kind) for kind in KINDS]
    total = found.total_s or 1.0
    columns = [
        Column("Time", [*(_swatch(kind) for kind in KINDS), "total"]),
        Column("Seconds", [*seconds, found.total_s], decimals=1),
        Column("%", [*(100 * s / total for s in seconds), 100.0], decimals=1),
        Column("What it is", [*KINDS.values(), "from the first start to the last end"]),
    ]
    return element("div", table(columns, marked_rows=[len(KINDS)], name="time"), "beside")


def _swatch(kind: str) -> Html:
    return Html(f'<span class="swatch {kind}"></span>{text(kind)}')


def _progress(facts: RunFacts) -> Html:
    """Steps over the clock: flat where a process started, a gap where nobody trained."""
    first = facts.segments[0].life.begin_s
    points: list[tuple[float, float]] = []
    bands = []
    for segment in facts.segments:
        life, record = segment.life, segment.record
        begin, working = life.begin_s - first, life.begin_s + life.starting_s - first
        if points and begin > points[-1][0]:
            words = f"waiting {duration(begin - points[-1][0])}"
            bands.append(Band(points[-1][0], begin, words, "waiting"))
        if points:  # steps that were lost are lost at the end of a segment, not little by little
            points.append((points[-1][0], record.start_step))
        points += [(begin, record.start_step), (working, record.start_step)]
        points.append((life.end_s - first, record.end_step))
    size, unit = _clock(points[-1][0])
    scaled = [(at / size, step) for at, step in points]
    marks = [
        # A mark stands at the step on the other charts, and at the moment on this one.
        type(mark)((segment.life.end_s - first) / size, mark.sign, mark.words, mark.kind)
        for mark, segment in zip(stops(facts), _stopped(facts), strict=True)
    ]
    return LineChart(
        key="progress",
        title="steps over the clock",
        description=f"{points[-1][1]:.0f} steps in {duration(points[-1][0])}",
        x_label=unit,
        lines=[Line("steps", scaled)],
        marks=marks,
        bands=[Band(b.start / size, b.end / size, b.words, b.kind) for b in bands],
        x_range=(0.0, max(scaled[-1][0], 1e-9)),
        has_legend=False,
    ).drawn()


def _stopped(facts: RunFacts) -> list[SegmentFacts]:
    return [one for one in facts.segments if one.outcome in ("preempted", "killed", "failed")]


def _clock(total_s: float) -> tuple[float, str]:
    sizes = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    return next(((size, unit) for size, unit in sizes if total_s >= 3 * size), (1.0, "seconds"))


def _segments(segments: tuple[SegmentFacts, ...]) -> Html:
    records = [segment.record for segment in segments]
    columns = [
        Column("Segment", [record.number for record in records]),
        Column("Began (UTC)", [record.started_at[:19].replace("T", " ") for record in records]),
        Column("Lived (s)", [one.life.end_s - one.life.begin_s for one in segments], decimals=1),
        Column("From step", [record.start_step for record in records]),
        Column("To step", [record.end_step for record in records]),
        Column("Done again", [one.life.num_repeated for one in segments]),
        Column("Host", [record.host for record in records]),
        Column("Ended", [one.outcome for one in segments]),
        Column("Why", [_reason(one) for one in segments]),
    ]
    if any(record.num_processes for record in records):
        columns.insert(1, Column("Processes", [record.num_processes or 1 for record in records]))
    if any(record.num_machines for record in records):
        columns.insert(2, Column("Machines", [record.num_machines or 1 for record in records]))
    return Html(element("h3", text("Segments")) + table(columns, name="segments"))


def _reason(one: SegmentFacts) -> str:
    record = one.record
    if record.notice is not None:
        return f"{record.notice.get('source', '')}: {record.notice.get('reason', '')}"
    if record.error is not None:
        return record.error.type
    return "left no last word" if one.outcome == "killed" else ""
