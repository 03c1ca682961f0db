"""A script that hands its champion over: the stages after training, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from holdfast.training.bundles.registry import Registry
from holdfast.training.errors import ExperimentError, InputError
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.exactness.trial import Trial
from holdfast.training.own_loop.champion import HandedOver, require_usable
from holdfast.training.own_loop.kept import Kept
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.paths import RunDirectory
from tests.documentation.pages import REPOSITORY
from tests.faults.campaign import Training, differences, final_state
from tests.generality.harness import QUICK_EXPORT, assert_published, stop_after
from tests.warm_start import WarmProcess

PAGE_SCRIPT = REPOSITORY / "docs/own_loop/champion.py"
SCRIPT = Path(__file__).with_name("champion_script.py")


def training(folder: Path) -> Training:
    """A training of the script, through the stages of the pipeline."""
    return Training(folder / "store", "first", f"sides={SCRIPT}")


def stage(asked: Training, name: str, *arguments: str) -> tuple[int, str, list[dict[str, Any]]]:
    """Run a stage: exit code, errors, events."""
    told = [f"--argument={argument}" for argument in arguments]
    segment = asked.start(arguments=told, stage=name)
    return segment.finish(), "".join(segment.errors), segment.events


def trained(folder: Path, *arguments: str) -> Training:
    """A finished training."""
    asked = training(folder)
    code, errors, events = stage(asked, "segment", *arguments)
    assert code == 0, errors
    assert events[-1]["event"] == "outcome"
    return asked


def evaluation(run: RunDirectory) -> dict[str, Any]:
    """What the choice says."""
    found: dict[str, Any] = json.loads(run.evaluation_json.read_text())
    return found


@pytest.mark.slow
def test_the_script_of_the_page_comes_to_its_bundle_with_the_bytes_that_it_has_alone(
    tmp_path: Path,
) -> None:
    asked = Training(tmp_path / "store", "first", f"sides={PAGE_SCRIPT}", QUICK_EXPORT)
    assert stage(asked, "segment")[0] == 0
    run = assert_published(asked)
    found = evaluation(run)
    assert {"best", "last", "average-top-4"} <= {one["name"] for one in found["candidates"]}
    assert found["test"]["bootstrap"]["num_units"] == 100
    interval = found["test"]["intervals"]["loss"]
    assert interval["low"] < interval["value"] < interval["high"]
    assert Registry(asked.store).position("sides", "champion") is not None
    assert json.loads((run.bundle / "manifest.json").read_text())["formats"].keys() == {
        "weights",
        "onnx",
    }, "what --set said counts in each stage"
    code, errors, _ = stage(asked, "report")
    assert code == 0, errors
    assert "accuracy" in run.report_html.read_text()

    (tmp_path / "alone").mkdir()
    process = WarmProcess([], child_environment(1), tmp_path / "alone", PAGE_SCRIPT)
    _, errors = process.communicate(240)
    assert process.returncode == 0, errors
    assert f"holdfast resume {tmp_path / 'alone/runs/sides/first'}" in errors
    alone = RunDirectory(tmp_path / "alone/runs/sides/first")
    assert differences(final_state(alone), final_state(run)) == []


@pytest.mark.slow
def test_numbers_without_samples_choose_as_well_and_have_no_intervals(tmp_path: Path) -> None:
    run = assert_published(trained(tmp_path, "--returns=numbers"))
    test = evaluation(run)["test"]
    assert test["metrics"].keys() == {"loss", "accuracy"}
    assert test["intervals"]["loss"]["low"] is None
    assert test["difference"]["loss"]["excludes_zero"] is False


@pytest.mark.slow
def test_a_lone_number_is_the_metric_and_no_test_data_is_told(tmp_path: Path) -> None:
    asked = trained(tmp_path, "--returns=number", "--fault=instance")
    run = assert_published(asked)
    found = evaluation(run)
    assert found["test"] is None
    assert found["champion"]["metrics"].keys() == {"loss"}
    manifest = json.loads((run.bundle / "manifest.json").read_text())
    assert manifest["champion"]["test_metrics"] == {}
    assert stage(asked, "report")[0] == 0


@pytest.mark.slow
def test_a_training_that_was_stopped_hands_over_the_same_bytes(tmp_path: Path) -> None:
    calm, stopped = trained(tmp_path / "calm"), training(tmp_path / "stopped")
    for number, step in ((SIGKILL, 7), (SIGTERM, 18), (SIGKILL, 33)):
        stop_after(stopped, number, step)
    assert stage(stopped, "segment")[0] == 0
    assert differences(final_state(calm.run), final_state(stopped.run)) == []


@pytest.mark.slow
def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    asked = trained(tmp_path)
    before = [record.number for record in read_segments(asked.run)]
    code, errors, events = stage(asked, "segment")
    assert code == 0, errors
    assert events[-1]["has_champion"] is True
    assert [record.number for record in read_segments(asked.run)] == before


def test_a_script_that_hands_nothing_over_says_so(tmp_path: Path) -> None:
    asked = training(tmp_path)
    code, errors, events = stage(asked, "segment", "--fault=leaves")
    assert (code, events[-1]["has_champion"]) == (0, False), errors
    assert all("of" not in event for event in events), "what it prints is not ours to parse"
    kept = (asked.run.logs / "segment-0001.log").read_text()
    assert "the script, and none of ours" in kept
    code, errors, _ = stage(asked, "candidates")
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: the script hands over no champion")
    assert stage(asked, "report")[0] == 0


@pytest.mark.parametrize("fault", ["early", "within"])
def test_a_champion_comes_after_the_loop(tmp_path: Path, fault: str) -> None:
    code, errors, _ = stage(training(tmp_path), "segment", f"--fault={fault}", "--steps=2")
    assert code == 2
    assert "run.champion(…) came after 0 steps, and training had not" in errors.splitlines()[-1]


@pytest.mark.slow
def test_what_an_evaluation_must_not_return_is_told_by_its_stage(tmp_path: Path) -> None:
    asked = trained(tmp_path, "--fault=text", "--steps=2")
    assert stage(asked, "candidates")[0] == 0
    code, errors, _ = stage(asked, "evaluate")
    assert code == 2
    assert "evaluate(model, 'validation') must return numbers" in errors.splitlines()[-1]


def net(width: int = 16) -> nn.Module:
    """What is kept."""
    return nn.Linear(6, width)


HANDED: dict[str, Any] = {
    "build": net,
    "evaluate": lambda model, split: {"loss": torch.ones(3)},  # noqa: ARG005
    "inputs": torch.zeros(4, 6),
    "metric": "loss",
    "whole": Kept(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": None}, r"example_inputs=…\): expected what the model is called with"),
        ({"inputs": [torch.zeros(2, 6), torch.zeros(3)]}, "whose first dimension counts samples"),
        ({"inputs": torch.zeros(0, 6)}, r"found a tensor of shape \[0, 6\]"),
        ({"inputs": {}}, r"found \{\}"),
        ({"build": None}, "expected the model that is kept, or a function"),
        ({"build": lambda: 3}, "the function returned an int"),
        ({"build": lambda: net(8)}, r"bias has the shape \[8\] in it, and \[16\] in what is kept"),
        ({"evaluate": 3}, r"expected a function of \(model\), or of"),
        ({"evaluate": lambda: 3}, r"expected a function of \(model\), or of"),
    ],
)
def test_what_cannot_stand_for_an_experiment_is_refused(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        require_usable(HandedOver(**{**HANDED, **change}), net())


def test_several_models_are_handed_over_as_one() -> None:
    several = nn.ModuleDict({"body": net(), "head": net(2)})
    with pytest.raises(InputError, match="has all kept ones as attributes: body, head"):
        require_usable(HandedOver(**HANDED), several)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = net(), net(2)

    require_usable(HandedOver(**{**HANDED, "build": Both}), several)
    require_usable(HandedOver(**{**HANDED, "build": Both()}), several)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"loss": "small"}, "'loss' is 'small'"),
        ({"loss": object()}, "'loss' is an object"),
        (None, "must return a number, a dict of numbers"),
        ({}, "must return a number, a dict of numbers"),
        ({"loss": torch.ones(3), "right": torch.ones(4)}, "loss with 3 rows, right with 4 rows"),
        ({"loss": torch.ones(3), "right": 0.5}, "loss with 3 rows, the number right"),
        ({"loss": torch.ones(3, 2)}, r"'loss' has rows of shape \[2\]: reduce them"),
        ({"loss": torch.ones(0)}, "loss with 0 rows"),
    ],
)
def test_what_an_evaluation_must_not_return_is_told(returned: Any, message: str) -> None:
    handed = HandedOver(**{**HANDED, "evaluate": lambda model, split: returned})  # noqa: ARG005
    with pytest.raises(ExperimentError, match=message):
        handed.measured(net(), "validation")


@pytest.mark.parametrize(
    ("returned", "metrics"),
    [
        (0.5, {"loss": 0.5}),
        (torch.tensor(0.5), {"loss": 0.5}),
        ({"right": np.float32(0.5), "loss": 1}, {"right": 0.5, "loss": 1.0}),
        ({"loss": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)}, {"loss": 2.0}),
        ({"loss": [1, 2, 6]}, {"loss": 3.0}),
        ({"right": torch.tensor([True, False])}, {"right": 0.5}),
    ],
)
def test_metrics_are_numbers_or_means_over_samples(
    returned: Any, metrics: dict[str, float]
) -> None:
    handed = HandedOver(**{**HANDED, "evaluate": lambda model: returned})  # noqa: ARG005
    assert not handed.has_test
    assert handed.metrics(handed.measured(net(), "validation")) == metrics


def test_metrics_of_ones_own_are_taken_of_samples() -> None:
    own = {"evaluate": lambda model, split="test", num=3: {"x": torch.ones(num, 2)}}  # noqa: ARG005
    handed = HandedOver(**{**HANDED, **own}, own_metrics=lambda one: {"sum": one["x"].sum()})
    assert handed.has_test
    assert handed.metrics(handed.measured(net(), "validation")) == {"sum": 6.0}


@pytest.mark.slow
def test_a_training_that_has_not_ended_has_no_candidates(tmp_path: Path) -> None:
    asked = training(tmp_path)
    trial = Trial(stop_at=7, stop_signal="SIGTERM")
    assert asked.start(trial.environment()).finish() == 75
    code, errors, _ = stage(asked, "candidates")
    assert code == 1
    assert "has not finished" in errors.splitlines()[-1]


def test_a_script_without_a_run_is_no_script_of_ours(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("print('hello')\n")
    asked = Training(tmp_path / "store", "first", str(other))
    code, errors, _ = stage(asked, "segment")
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: the script does not call holdfast.run")
