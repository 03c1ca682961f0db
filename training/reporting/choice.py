"""Candidates, their scores, and what the test set says about the champion."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.training.reporting.comparisons import DotChart, DotRow
from holdfast.training.reporting.facts import CandidateFacts, Estimate, RunFacts, TestFacts
from holdfast.training.reporting.headline import difference_of
from holdfast.training.reporting.markup import (
    Cell,
    Column,
    Html,
    element,
    joined,
    note,
    section,
    table,
    text,
)
from holdfast.training.reporting.wording import decimals_for, number, plural, signed


def candidates_section(facts: RunFacts) -> Html:
    """A chart and a table of scores, best first."""
    if facts.champion is None:
        stages = "run the stages candidates and evaluate when training is done"
        way_on = stages if facts.record.script is None else "holdfast resume goes on"
        words = f"Not measured yet: {way_on}."
        return section("Candidates", note(words))
    ranked = ranked_candidates(facts)
    charts = [_validation_chart(facts, ranked).drawn()]
    tables = [_table(facts, ranked)]
    if facts.test is not None:
        charts.append(element("div", joined(_test_charts(facts, facts.test)), "stack"))
        tables.append(_test_table(facts, facts.test))
    tables += [_slow(one) for one in ranked if one.slowdown is not None]
    content = element("div", joined(charts), "charts") + joined(tables)
    return section("Candidates", Html(content), f"The rule: {facts.rule}.")


def _slow(one: CandidateFacts) -> Html:
    told = number(one.slowdown, 1)
    words = f"A call of {one.name} took {told} times as long as one of the single best."
    return element("p", text(words), "note", varies=True)


def ranked_candidates(facts: RunFacts) -> list[CandidateFacts]:
    """The champion, then the others from good to bad; those without a value come last."""
    sign = 1 if facts.mode == "min" else -1

    def place(one: CandidateFacts) -> tuple[bool, bool, float]:
        value = one.validation.get(facts.metric)
        return one.name != facts.champion, value is None, sign * (value or 0.0)

    return sorted(facts.candidates, key=place)


def _validation_chart(facts: RunFacts, ranked: Sequence[CandidateFacts]) -> DotChart:
    rows = [
        DotRow(one.name, Estimate(value), _role(facts, one))
        for one in ranked
        if (value := one.validation.get(facts.metric)) is not None
    ]
    title = f"Validation {facts.metric}"
    return DotChart("dots-validation", title, _told(rows), rows, _axis_words(facts))


def _test_charts(facts: RunFacts, test: TestFacts) -> list[Html]:
    metric = facts.metric
    named = [(facts.champion or "", test.champion, "main")]
    if test.single_best_name != facts.champion:
        named.append((test.single_best_name, test.single_best, "plain"))
    rows = [DotRow(name, found[metric], role) for name, found, role in named if metric in found]
    if not rows:
        return []
    title = f"Test {metric}{_confidence(test)}"
    charts = [DotChart("dots-test", title, _told(rows), rows, _axis_words(facts))]
    difference = difference_of(test, metric)
    if difference is not None and len(rows) > 1:
        row = DotRow("difference", difference, "main")
        title = f"Champion minus {test.single_best_name}{_confidence(test)}"
        told = f"{number(difference.value)}, zero is no difference"
        charts.append(DotChart("dots-difference", title, told, [row], f"test {metric}", zero=True))
    return [chart.drawn() for chart in charts]


def _told(rows: Sequence[DotRow]) -> str:
    return "; ".join(f"{row.name} {number(row.estimate.value)}" for row in rows)


def _axis_words(facts: RunFacts) -> str:
    return f"{facts.metric}, {'smaller' if facts.mode == 'min' else 'larger'} is better"


def _table(facts: RunFacts, ranked: Sequence[CandidateFacts]) -> Html:
    every = [name for one in ranked for name in one.validation]
    names = list(dict.fromkeys([facts.metric, *every]))
    columns = [
        Column("Candidate", [_starred(facts, one) for one in ranked]),
        Column("Made from", [_sources(one) for one in ranked]),
    ]
    columns += [
        Column(name, [_value(one.validation.get(name)) for one in ranked]) for name in names
    ]
    caption = note("Validation metrics, the champion first and the others from good to bad.")
    return Html(f"<div>{caption}{table(columns, marked_rows=[0], name='candidates')}</div>")


def _test_table(facts: RunFacts, test: TestFacts) -> Html:
    names = list(test.champion)
    found = [("Champion", [test.champion.get(name) for name in names], False)]
    if test.single_best_name != facts.champion:
        found.append(("Single best", [test.single_best.get(name) for name in names], False))
        found.append(("Difference", [difference_of(test, name) for name in names], True))
    columns = [Column("Test metric", names)]
    for heading, estimates, is_signed in found:
        written = [_estimate(one, is_signed=is_signed) for one in estimates]
        columns.append(Column(heading, [value for value, _ in written], is_right=True))
        if test.confidence is not None:
            columns.append(Column("interval", [limits for _, limits in written], is_right=True))
    marked = [names.index(facts.metric)] if facts.metric in names else []
    unit = f"resampled by {test.unit}" if test.confidence else "without intervals"
    caption = note(f"Test data, opened once after the choice{_confidence(test)}, {unit}.")
    return Html(f"<div>{caption}{table(columns, marked_rows=marked, name='test metrics')}</div>")


def _estimate(estimate: Estimate | None, *, is_signed: bool) -> tuple[Cell, Cell]:
    """A value and its limits, with as many decimals as each other."""
    if estimate is None:
        return None, None
    limits = [limit for limit in (estimate.low, estimate.high) if limit is not None]
    decimals = decimals_for([estimate.value, *limits], 3 if is_signed else 4)
    write = signed if is_signed else number
    words = " to ".join(write(limit, decimals) for limit in limits) or None
    return write(estimate.value, decimals), words and element("span", text(words), "limits")


def _starred(facts: RunFacts, one: CandidateFacts) -> str:
    return f"{one.name} \u2605" if one.name == facts.champion else one.name


def _sources(one: CandidateFacts) -> str:
    if len(one.steps) == 1:
        return f"step {number(one.steps[0], 0)}"
    return plural(len(one.steps), "checkpoint")


def _value(value: float | None) -> float | None:
    # A whole number among fractions is one of them: 1 is shown as 1.0000.
    return None if value is None else float(value)


def _role(facts: RunFacts, one: CandidateFacts) -> str:
    return "main" if one.name == facts.champion else "plain"


def _confidence(test: TestFacts) -> str:
    if test.confidence is None:
        return ""
    return f", {100 * test.confidence:.0f}\N{NARROW NO-BREAK SPACE}% interval"
