"""The top of the page: which weights won, what they are worth, and whether the exports hold."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.training.reporting import script
from holdfast.training.reporting.facts import Estimate, RunFacts, TestFacts
from holdfast.training.reporting.markup import Html, element, joined, text
from holdfast.training.reporting.wording import decimals_for, number, percent, plural, signed

BETTER, WORSE = "better", "worse"


def headline(facts: RunFacts) -> Html:
    """Title, one sentence, and the figures that matter."""
    kicker = element("p", text(f"Holdfast \N{MIDDLE DOT} {facts.record.experiment}"), "kicker")
    title = element("h1", text(facts.record.run_id))
    lead = element("p", text(summary(facts)), "summary")
    if script.is_trained_alone(facts):
        tiles = [_tile(name, value, words) for name, value, words in script.tiles(facts)]
    else:
        tiles = [_champion(facts), _test(facts), _against(facts), _exports(facts)]
    tiles.append(_goodput(facts))
    return Html(f'<header>{kicker}{title}{lead}<div class="tiles">{joined(tiles)}</div></header>')


def summary(facts: RunFacts) -> str:
    """What became of the run, in a sentence."""
    champion = facts.candidate(facts.champion)
    if champion is None and facts.record.script is not None:
        return script.summary(facts)
    if champion is None:
        planned = plural(facts.config.train.num_epochs, "epoch")
        return f"No champion yet: {len(facts.history)} of {planned} done."
    score, metric = champion.validation.get(facts.metric), facts.metric
    best = facts.candidate(facts.test.single_best_name) if facts.test else None
    first = (
        f"{champion.name} won among {plural(len(facts.candidates), 'candidate')} with a validation "
        f"{metric} of {number(score)}"
    )
    if best is None or best.name == champion.name:
        return first + "."
    return f"{first}; the single best checkpoint has {number(best.validation.get(metric))}."


def verdict(facts: RunFacts, difference: Estimate) -> str:
    """What a difference on test data says, in words."""
    if difference.low is None or difference.high is None:
        return "no interval was measured"
    if difference.low <= 0 <= difference.high:
        return "no clear difference"
    is_better = (difference.value < 0) == (facts.mode == "min")
    return f"clearly {BETTER if is_better else WORSE}"


def interval_words(estimate: Estimate, decimals: int, *, is_signed: bool = False) -> str:
    """The limits of an estimate, with the decimals of its value; empty where there are none."""
    if estimate.low is None or estimate.high is None:
        return ""
    write = signed if is_signed else number
    return f"{write(estimate.low, decimals)} to {write(estimate.high, decimals)}"


def _champion(facts: RunFacts) -> Html:
    champion = facts.candidate(facts.champion)
    if champion is None:
        return _tile(
            "Champion", "not chosen", [_next(facts, "run the stages candidates and evaluate")]
        )
    steps = champion.steps
    source = f"step {steps[0]:,}" if len(steps) == 1 else plural(len(steps), "checkpoint")
    return _tile("Champion", champion.name, [f"made from {source}"], is_name=True)


def _test(facts: RunFacts) -> Html:
    name = f"Test {facts.metric}"
    found = facts.test.champion.get(facts.metric) if facts.test else None
    if facts.test is None or found is None:
        return _tile(name, "not measured", [_untested(facts)])
    decimals = decimals_for([found.value])
    confidence = facts.test.confidence
    told = f"{100 * confidence:.0f}\N{NARROW NO-BREAK SPACE}% interval" if confidence else ""
    limits = interval_words(found, decimals)
    return _tile(name, number(found.value, decimals), [limits, told])


def _against(facts: RunFacts) -> Html:
    name, test = "Against the single best", facts.test
    if test is None:
        return _tile(name, "not measured", [])
    if test.single_best_name == facts.champion:
        return _tile(name, "the same", ["the single best checkpoint won"])
    difference = difference_of(test, facts.metric)
    if difference is None:
        return _tile(name, "not measured", [])
    decimals = decimals_for([difference.value], 3)
    limits = interval_words(difference, decimals, is_signed=True)
    return _tile(name, signed(difference.value, decimals), [limits, verdict(facts, difference)])


def difference_of(test: TestFacts, metric: str) -> Estimate | None:
    """Champion minus single best: with its interval, or without where none was measured."""
    if metric in test.difference:
        return test.difference[metric]
    one, other = test.champion.get(metric), test.single_best.get(metric)
    return None if one is None or other is None else Estimate(one.value - other.value)


def _exports(facts: RunFacts) -> Html:
    if not facts.exports:
        return _tile("Exports", "no bundle", [_next(facts, "run the stage export")])
    passed = [row for row in facts.exports if row["is_passed"]]
    failed = [str(row["format"]) for row in facts.exports if not row["is_passed"]]
    value = f"{len(passed)} of {len(facts.exports)} proved"
    words = f"failed: {', '.join(failed)}" if failed else "outputs within the bounds of parity"
    return _tile("Exports", value, [words])


def _next(facts: RunFacts, stages: str) -> str:
    return stages if facts.record.script is None else "holdfast resume goes on"


def _untested(facts: RunFacts) -> str:
    if facts.record.script is not None and facts.champion is not None:
        return "the script's evaluate takes no split: it has no test data"
    return "test data is opened after the choice"


def _goodput(facts: RunFacts) -> Html:
    if not facts.segments:
        return _tile("Goodput", "no segment", [], varies=True)
    outcomes = [segment.outcome for segment in facts.segments]
    stops = [
        f"{outcomes.count(outcome)} {outcome}"
        for outcome in ("preempted", "killed", "failed")
        if outcome in outcomes
    ]
    told = [plural(len(outcomes), "segment"), *stops]
    return _tile("Goodput", percent(facts.ledger.goodput), [", ".join(told)], varies=True)


def _tile(
    name: str, value: str, words: Sequence[str], *, is_name: bool = False, varies: bool = False
) -> Html:
    # A name may break at its dashes; a figure never breaks.
    kind = "value name" if is_name else "value"
    parts = [element("p", text(name), "label"), element("p", text(value), kind)]
    parts += [element("p", text(line), "detail") for line in words if line]
    return element("div", joined(parts), "tile", varies=varies)
