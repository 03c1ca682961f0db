"""The page, from facts: what it says, what it escapes, and that it needs nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from holdfast.training.reporting.facts import Estimate
from holdfast.training.reporting.figures import Confusion, Sentence, Sentences
from holdfast.training.reporting.headline import verdict
from holdfast.training.reporting.page import page
from holdfast.training.runs.directory import RunRecord
from tests.training.reporting.report_pages import full_facts, new_facts


class Outline(HTMLParser):
    """Tags that are open, ids, and the addresses that a page refers to."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.names: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [f"{name}={value}" for name, value in attrs if name in ("src", "href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outline(content: str) -> Outline:
    found = Outline()
    found.feed(content)
    found.close()
    assert found.open == []
    return found


def test_the_page_is_well_formed_and_refers_to_nothing() -> None:
    content = page(full_facts())
    found = outline(content)
    assert len(found.ids) == len(set(found.ids))
    assert found.addresses == []
    assert found.handlers == []
    assert not {"script", "link", "iframe", "img", "object"} & set(found.names)
    assert not re.search(r"https?://|url\(|@import", content)


def test_every_picture_says_in_words_what_it_shows() -> None:
    content = page(full_facts())
    pictures = re.findall(r"<svg [^>]*>(.*?)</svg>", content, re.S)
    told = [picture for picture in pictures if "<title" in picture and "<desc" in picture]
    samples = re.findall(r'<svg class="sample[^>]*aria-hidden="true"', content)
    assert len(told) + len(samples) == len(re.findall("<svg ", content))
    assert len(told) >= 8


def test_the_same_facts_give_the_same_bytes() -> None:
    assert page(full_facts()) == page(full_facts())


def test_a_finished_run_is_told_in_figures() -> None:
    content = page(full_facts())
    for words in (
        "average-top-5 won among 4 candidates with a validation loss of 0.02430",
        "0.01200 to 0.03800",
        "clearly better",
        "1 of 1 proved",
        "3 segments, 1 preempted, 1 killed",
        "segment 1 preempted at step 120",
        "20 steps done again",
        "engine 3",
        "forty-two",
        "signal: SIGTERM",
    ):
        assert words in content, words


def test_spaces_that_keep_a_number_and_its_unit_together_are_spaces() -> None:
    content = page(full_facts())
    assert "95\N{NARROW NO-BREAK SPACE}% interval" in content
    assert "\\u" not in content


def test_a_new_run_says_what_is_not_there_yet() -> None:
    content = page(new_facts())
    outline(content)
    for words in (
        "No champion yet: 0 of 10 epochs done",
        "No epoch is finished yet",
        "No segment has run yet",
        "no bundle",
        "test data is opened after the choice",
    ):
        assert words in content, words


def test_parts_may_be_missing_one_by_one() -> None:
    facts = full_facts()
    for changes in (
        {"test": None},
        {"figures": ()},
        {"exports": ()},
        {"history": facts.history[:1]},
        {"segments": facts.segments[:1]},
        {"champion": None},
        {"champion": "best"},
        {"champion": None, "candidates": (), "test": None},
    ):
        outline(page(replace(facts, **changes)))


def test_text_of_others_is_escaped() -> None:
    bad = "<script>alert(1)</script>&\"'"
    facts = full_facts()
    matrix = Confusion(bad, bad, (bad, "b"), ((1, 2), (3, 4)))
    sentences = Sentences(bad, bad, (Sentence(bad, bad, bad),))
    metrics = {bad: Estimate(1.0, 0.5, 2.0)}
    assert facts.test is not None
    facts = replace(
        facts,
        record=record_with(bad),
        history=tuple(replace(epoch, metrics={"loss": 1.0, bad: 2.0}) for epoch in facts.history),
        candidates=tuple(replace(one, name=one.name + bad) for one in facts.candidates),
        champion="best" + bad,
        rule=bad,
        test=replace(facts.test, champion=metrics, single_best=metrics, single_best_name=bad),
        figures=(matrix, sentences),
    )
    found = outline(page(facts))
    assert "script" not in found.names


def record_with(bad: str) -> RunRecord:
    record = full_facts().record
    config = {**record.config, "experiment": {bad: bad}}
    return record.model_copy(update={"run_id": bad, "config": config, "versions": {bad: bad}})


def test_the_page_says_whether_the_bundle_became_the_champion_of_its_name_and_why() -> None:
    reason = "version 3 held it; worse: loss 0.03 against the holder&#x27;s 0.02"
    assert f"Published as pictures@4; did not become champion: {reason}." in page(full_facts())


def test_a_failed_export_is_named() -> None:
    facts = full_facts()
    facts = replace(facts, exports=({**facts.exports[0], "is_passed": False},))
    content = page(facts)
    assert "0 of 1 proved" in content
    assert "failed: onnx" in content


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (Estimate(-0.2, -0.3, -0.1), "clearly better"),
        (Estimate(0.2, 0.1, 0.3), "clearly worse"),
        (Estimate(0.2, -0.1, 0.3), "no clear difference"),
        (Estimate(0.2), "no interval was measured"),
    ],
)
def test_a_difference_is_put_in_words_by_its_interval(estimate: Estimate, words: str) -> None:
    assert verdict(new_facts(), estimate) == words


def test_settings_that_were_changed_stand_out() -> None:
    facts = full_facts()
    config = {**facts.record.config, "train": {**facts.record.config["train"], "num_epochs": 77}}
    record = facts.record.model_copy(update={"config": config})
    content = page(replace(facts, record=record))
    assert "<strong>77</strong>" in content
    assert content.count("<strong>") == 1


def test_parameter_groups_with_rates_of_their_own_have_charts_of_their_own() -> None:
    facts = full_facts()
    [rates] = facts.rates.values()
    slower = tuple((step, rate / 2) for step, rate in rates)
    content = page(replace(facts, rates={"decay": rates, "no_decay": rates, "head": slower}))
    assert "learning rate of decay, no_decay" in content
    assert "learning rate of head" in content
    found = outline(content)
    assert len(found.ids) == len(set(found.ids))
    alike = page(replace(facts, rates={"decay": rates, "no_decay": rates}))
    assert alike == page(facts)
