"""Learning curves, the learning rate, and where segments stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, pairwise

from holdfast.training.reporting.charts import Band, Line, LineChart, Mark, Ring
from holdfast.training.reporting.facts import Epoch, RunFacts
from holdfast.training.reporting.markup import Html, element, joined, note, section, text
from holdfast.training.reporting.wording import number, plural

LEAD = "Over optimizer steps; validation after each epoch, training loss as the epoch's mean."
SCRIPT_LEAD = (
    "Over optimizer steps; validation where the script has validated, training loss as the mean "
    "since the validation before."
)
MAX_METRIC_CHARTS = 5
MAX_RATE_CHARTS = 4
SIGNS = {"preempted": "\u25bc", "killed": "\u2715", "failed": "!"}
Value = Callable[[Epoch], float | None]


def learning_section(facts: RunFacts) -> Html:
    """Curves over steps, with marks where segments stopped."""
    is_script = facts.record.script is not None
    if not facts.history:
        none = "The script has validated nothing so far."
        return section("Learning curves", note(none if is_script else "No epoch is finished yet."))
    charts = [_chart(facts, name) for name in _metric_names(facts)]
    charts += _rate_charts(facts)
    drawn = [chart.drawn() for chart in charts if chart is not None]
    content = element("div", joined(drawn), "charts") + _key(facts)
    lead = SCRIPT_LEAD if is_script else LEAD
    return section("Learning curves", Html(content), " ".join([lead, *_spikes(facts)]))


def _spikes(facts: RunFacts) -> Iterator[str]:
    """A sentence for each loss that spiked."""
    for one in facts.left_out:
        reason = one.reason[:1].upper() + one.reason[1:]
        which = f"steps {one.first} to {one.step} were" if one.first < one.step else "it was"
        yield f"{reason}: {which} left out."


def stops(facts: RunFacts) -> Iterator[Mark]:
    """A mark where a segment ended before its work was done."""
    for segment in facts.segments:
        if segment.outcome in SIGNS:
            record = segment.record
            words = f"segment {record.number} {segment.outcome} at step {record.end_step}"
            yield Mark(record.end_step, SIGNS[segment.outcome], words, segment.outcome)


def repeats(facts: RunFacts) -> Iterator[Band]:
    """The steps that the next segment had to do again."""
    for before, after in pairwise(facts.segments):
        start, end = after.record.start_step, before.record.end_step
        if start < end:
            yield Band(start, end, f"{plural(end - start, 'step')} done again")


def best_epoch(facts: RunFacts) -> Epoch | None:
    """The epoch with the best value of the metric that decides; of equal ones the first."""
    found = [epoch for epoch in facts.history if facts.metric in epoch.metrics]
    sign = 1 if facts.mode == "min" else -1
    return min(found, key=lambda epoch: sign * epoch.metrics[facts.metric], default=None)


def _metric_names(facts: RunFacts) -> list[str]:
    """Loss, the metric that decides, then the others."""
    every = [name for epoch in facts.history for name in epoch.metrics]
    return list(dict.fromkeys(["loss", facts.metric, *every]))[:MAX_METRIC_CHARTS]


def _chart(facts: RunFacts, name: str) -> LineChart | None:
    lines = [_line(facts, "validation", lambda epoch: epoch.metrics.get(name), "main")]
    if name == "loss":
        lines.append(_line(facts, "training", lambda epoch: epoch.train_loss, "second"))
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    best = best_epoch(facts) if name == facts.metric else None
    rings = [Ring(best.step, best.metrics[name], _told_best(best, name))] if best else []
    return LineChart(
        key=f"curve-{_place(facts, name)}",
        title=name,
        description="; ".join(_told(line) for line in lines),
        x_label="step",
        lines=lines,
        rings=rings,
        marks=tuple(stops(facts)),
        bands=tuple(repeats(facts)),
        x_range=(0, facts.history[-1].step),
        may_log=True,
        has_legend=len(lines) > 1,
    )


def _rate_charts(facts: RunFacts) -> Iterator[LineChart]:
    """One for all parameter groups that have the same rates."""
    last = facts.history[-1].step
    alike: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for label, rates in facts.rates.items():
        alike.setdefault(rates, []).append(label)
    for place, (rates, labels) in enumerate(islice(alike.items(), MAX_RATE_CHARTS)):
        points = [(float(step), rate) for step, rate in rates if step < last]
        if not points:
            continue
        title = "learning rate" if len(alike) == 1 else f"learning rate of {', '.join(labels)}"
        line = Line(title, points, "main")
        yield LineChart(
            key=f"curve-rate-{place}" if place else "curve-rate",
            title=title,
            description=_told(line),
            x_label="step",
            lines=[line],
            marks=tuple(stops(facts)),
            bands=tuple(repeats(facts)),
            x_range=(0, last),
            has_legend=False,
        )


def _line(facts: RunFacts, name: str, value: Value, role: str) -> Line:
    points = [(epoch.step, value(epoch)) for epoch in facts.history]
    return Line(name, [(float(x), y) for x, y in points if y is not None], role)


def _told_best(best: Epoch, name: str) -> str:
    return f"best {number(best.metrics[name])} at step {number(best.step, 0)}"


def _told(line: Line) -> str:
    first, last = line.points[0][1], line.points[-1][1]
    return f"{line.name} from {number(first)} to {number(last)}"


def _place(facts: RunFacts, name: str) -> int:
    return _metric_names(facts).index(name)


def _key(facts: RunFacts) -> Html:
    """What the marks mean, where there are any."""
    kinds = dict.fromkeys(mark.kind for mark in stops(facts))
    told = [f"{SIGNS[kind]} a segment was {kind}" for kind in kinds if kind != "failed"]
    told += [f"{SIGNS['failed']} a segment failed"] if "failed" in kinds else []
    if any(repeats(facts)):
        told.append("\u25a8 steps that were done again")
    words = " \N{MIDDLE DOT} ".join(told)
    return element("p", text(words), "note", varies=True) if told else Html("")
