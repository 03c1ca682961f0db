"""The report of a script's own loop: its own configuration and progress, and no stages."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import pytest

from holdfast.training.own_loop.opening import OWN, OWN_KEYS, run_config
from holdfast.training.reporting.facts import RunFacts
from holdfast.training.reporting.page import page
from holdfast.training.runs.directory import Script, TakenOver
from tests.training.reporting.report_pages import full_facts, moment, new_facts

OF_STAGES = ("run the stage", "stages candidates", "of 10 epochs", "No candidates", "No bundle")


def words(facts: RunFacts) -> str:
    """What a reader of the page sees."""
    seen = re.sub(r"<style.*?</style>|<[^>]*>", "\n", page(facts), flags=re.DOTALL)
    return re.sub(r"\n+", "\n", unescape(seen))


def of_script(facts: RunFacts, **changed: object) -> RunFacts:
    config = run_config(7, {"lr": 0.25, "depth": 12}, {"checkpoint.every_steps": 50})
    record = facts.record.model_copy(
        update={
            "config": config.model_dump(mode="json"),
            "script": Script(path="/code/train.py", arguments=["--lr", "0.25"]),
            "data_fingerprint": None,
        }
    )
    return replace(facts, record=record, config=config, **changed)  # type: ignore[arg-type]


def trained_alone() -> RunFacts:
    """What ``holdfast exec`` leaves."""
    trained = {"candidates": (), "champion": None, "test": None, "exports": (), "promotion": {}}
    return of_script(full_facts(), **trained)


def test_a_script_is_shown_with_its_own_configuration_and_nothing_of_stages() -> None:
    seen = words(trained_alone())
    assert "400 steps done; training has ended. Best validation loss" in seen
    assert "lr\n0.25" in seen
    assert "depth\n12" in seen
    assert "every_steps\n50" in seen
    assert "/code/train.py --lr 0.25" in seen
    shown = seen[seen.index("Configuration") :].splitlines()
    for name in (*OWN, "batch_size", "num_epochs", "clip_norm", "selection", "export"):
        assert name not in shown
    assert not [phrase for phrase in OF_STAGES if phrase in seen]
    assert "champion" not in seen


def test_a_script_that_has_not_begun_says_so() -> None:
    seen = words(of_script(new_facts()))
    assert "No step is done yet." in seen
    assert "The script has validated nothing so far" in seen
    assert not [phrase for phrase in OF_STAGES if phrase in seen]


def test_epochs_are_shown_where_the_script_has_them() -> None:
    assert "400 steps in 20 epochs done" in words(replace(trained_alone(), num_epochs=20))


def test_a_script_with_a_champion_is_shown_as_an_experiment_is() -> None:
    seen = words(replace(of_script(full_facts()), test=None))
    assert "average-top-5 won among 4 candidates" in seen
    assert "the script's evaluate takes no split: it has no test data" in seen
    assert "Predictions" not in seen
    assert "top_k" in seen


def test_an_earlier_configuration_is_told() -> None:
    facts = trained_alone()
    before = TakenOver(
        segment=3, step=240, at=moment(0), config_digest="sha256:0", changed={"experiment.lr": 0.5}
    )
    record = facts.record.model_copy(update={"taken_over": [before]})
    told = "Segment 3 went on from step 240 with another configuration; before it: experiment.lr ="
    assert told in words(replace(facts, record=record))


@pytest.mark.parametrize("key", sorted(OWN_KEYS))
def test_what_the_page_leaves_out_is_no_setting_of_a_script(key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(key))):
        run_config(0, None, {key: 1})
