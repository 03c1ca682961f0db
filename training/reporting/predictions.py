"""Predictions against truth, as the experiment offers them."""

from __future__ import annotations

from holdfast.training.reporting.charts import Line, LineChart
from holdfast.training.reporting.comparisons import confusion_chart
from holdfast.training.reporting.figures import Confusion, Figure, Sentences, Series
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

SMALL = (300, 184)


def predictions_section(facts_figures: tuple[Figure, ...], champion: str | None) -> Html:
    """All figures of the experiment, made by the champion."""
    title = "Predictions against truth"
    if champion is None:
        return section(title, note("There is no champion to predict with yet."))
    if not facts_figures:
        return section(title, note("The experiment offers no figures: it has no method figures()."))
    drawn = [_figure(figure, place) for place, figure in enumerate(facts_figures)]
    lead = f"Made by the champion, {champion}, on the data named beside each figure."
    return section(title, joined(drawn), lead)


def _figure(figure: Figure, place: int) -> Html:
    key = f"figure-{place}"
    if isinstance(figure, Confusion):
        parts = [confusion_chart(key, figure), _class_table(figure)]
        return element("div", joined(parts), "charts")
    if isinstance(figure, Series):
        return _series(key, figure)
    return _sentences(figure)


def _class_table(confusion: Confusion) -> Html:
    """How many of each class were recognised, and what the others were taken for."""
    names, right, mistakes = confusion.class_names, [], []
    for true, row in enumerate(confusion.counts):
        right.append(row[true])
        wrong = sorted(((-n, i) for i, n in enumerate(row) if n and i != true))
        mistakes.append(", ".join(f"{names[i]} ({-n})" for n, i in wrong) or "")
    samples = [sum(row) for row in confusion.counts]
    share = [100 * r / n if n else None for r, n in zip(right, samples, strict=True)]
    columns = [
        Column("Class", [*names]),
        Column("Samples", samples),
        Column("Recognised", right),
        Column("%", share, decimals=1),
        Column("Taken for", mistakes),
    ]
    return element("div", table(columns, name="classes"), "beside")


def _series(key: str, series: Series) -> Html:
    every = [y for panel in series.panels for _, y in (*panel.truth, *panel.prediction)]
    bounds = (min(0.0, *every), 1.04 * max(every))
    charts = [
        LineChart(
            key=f"{key}-{place}",
            title=panel.title,
            description=f"{series.title}: truth and prediction of {panel.title}",
            x_label=series.x_label,
            lines=[
                Line("truth", _corners(panel.truth), "quiet"),
                Line("prediction", panel.prediction),
            ],
            y_range=bounds,
            size=SMALL,
            has_legend=place == 0,
        ).drawn()
        for place, panel in enumerate(series.panels)
    ]
    head = element("h3", text(series.title)) + note(f"{series.data}. Vertical: {series.y_label}.")
    return Html(head + element("div", joined(charts), "charts three"))


def _corners(points: tuple[tuple[float, float], ...]) -> list[tuple[float, float]]:
    """A line without the points that lie on the straight between their neighbours."""
    kept = [
        here
        for before, here, after in zip(points, points[1:], points[2:], strict=False)
        if abs(_slope(before, here) - _slope(here, after)) > 1e-9
    ]
    return [*points[:1], *kept, *points[-1:]] if len(points) > 2 else [*points]


def _slope(one: tuple[float, float], other: tuple[float, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])


def _sentences(sentences: Sentences) -> Html:
    rows = [
        element(
            "article",
            joined(
                [
                    _said("source", row.source),
                    _said("reference", row.reference),
                    _said("model", row.output),
                ]
            ),
        )
        for row in sentences.rows
    ]
    head = element("h3", text(sentences.title)) + note(f"{sentences.data}.")
    return Html(head + element("div", joined(rows), "sentences"))


def _said(who: str, words: str) -> Html:
    return Html(f'<p class="{who}"><span>{who}</span>{text(words)}</p>')
