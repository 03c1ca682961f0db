"""The gate for the alias: not worse with confidence, on the same samples."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.training.bundles.promotion import (
    Comparison,
    compare_bundles,
    deciding_metric,
    paired_differences,
    promote,
)
from holdfast.training.bundles.registry import Registry
from holdfast.training.configuration.schema import PromotionConfig, RunConfig, SelectionConfig
from tests.training.bundles.small_bundle import seal


class MeanLoss:
    def metrics(self, records: dict[str, Any]) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


def comparison(shift: float, noise: float) -> Comparison:
    generator = np.random.Generator(np.random.PCG64(5))
    holder = generator.random(400) + 1
    new = holder + shift + noise * generator.standard_normal(400)
    experiment: Any = MeanLoss()
    differences = paired_differences(experiment, ({"loss": new}, {"loss": holder}), "loss", 500)
    limit = float(np.quantile(differences, 0.95))
    return Comparison("loss", new.mean(), holder.mean(), shift, limit, 0.02 * holder.mean())


def test_equal_models_are_not_worse() -> None:
    assert comparison(0.0, 0.0).upper_limit == 0.0
    assert comparison(0.0, 0.0).is_good_enough


def test_a_clear_worsening_is_refused_and_a_clear_gain_is_taken() -> None:
    assert not comparison(0.1, 0.05).is_good_enough
    assert comparison(-0.1, 0.05).is_good_enough
    assert comparison(0.1, 0.05).explain().startswith("worse: loss ")
    assert "0.1 better; with confidence at most -" in comparison(-0.1, 0.05).explain()


def test_a_difference_that_the_data_cannot_rule_out_is_refused() -> None:
    assert not comparison(0.0, 2.0).is_good_enough
    assert comparison(0.0, 2.0).explain().startswith("may be worse: loss ")


class MeanLossByEngine(MeanLoss):
    resampling_unit = "engine"


def test_windows_of_one_engine_are_no_evidence_on_their_own() -> None:
    loss = np.repeat(np.random.RandomState(0).standard_normal(8), 50)
    records = {"loss": loss, "engine": np.repeat(np.arange(8), 50)}
    pair = (records, {**records, "loss": np.zeros(400)})
    by_sample: Any = MeanLoss()
    by_engine: Any = MeanLossByEngine()
    spread = [
        paired_differences(experiment, pair, "loss", 200).std()
        for experiment in (by_sample, by_engine)
    ]
    assert spread[1] > 4 * spread[0]


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 0.2), st.floats(0, 0.2))
def test_more_worsening_never_helps(small: float, more: float) -> None:
    assert comparison(small, 0.1).upper_limit <= comparison(small + more, 0.1).upper_limit + 1e-9


def test_the_metric_of_the_selection_decides_unless_another_is_set() -> None:
    selection = SelectionConfig(metric="accuracy", mode="max")
    assert deciding_metric(RunConfig(selection=selection)) == ("accuracy", "max")
    promotion = PromotionConfig(metric="rmse", mode="min")
    assert deciding_metric(RunConfig(selection=selection, promotion=promotion)) == ("rmse", "min")


def test_bundles_are_compared_by_the_models_that_they_serve(exported: Any) -> None:
    case = exported["Pictures"]
    found = compare_bundles(case.place.bundle, case.place.bundle, case.experiment, RunConfig())
    assert found.new == found.holder == pytest.approx(case.champion.metrics["loss"], rel=1e-5)
    assert (found.worsening, found.upper_limit) == (0.0, 0.0)


class TwoVersions(Registry):
    """A registry whose bundles are real models, one of them deaf to its input."""

    def __init__(self, store: Path, folders: dict[int, Path]) -> None:
        super().__init__(store)
        self._folders = folders

    def bundle(self, name: str, version: int) -> Path:
        return self._folders[version]

    def versions(self, name: str) -> list[int]:
        return sorted(self._folders)


def sealed(case: Any, folder: Path) -> Path:
    """A copy of what was exported, with a manifest."""
    return seal(Path(shutil.copytree(case.place.bundle, folder)))


def test_a_worse_champion_is_kept_but_not_promoted(exported: Any, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    case = exported["Pictures"]
    model = onnx.load(case.place.bundle / "1/model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "model.classifier.bias":
            worse = numpy_helper.to_array(tensor) + np.array([4, -4, 9], dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(worse, tensor.name))
    (tmp_path / "worse/1").mkdir(parents=True)
    onnx.save(model, tmp_path / "worse/1/model.onnx")
    registry = TwoVersions(tmp_path, {1: sealed(case, tmp_path / "1"), 2: tmp_path / "worse"})

    before_moves: list[dict[str, int]] = []

    def before_move() -> None:
        before_moves.append(registry.aliases("p"))

    first = promote(registry, ("p", 1), "champion", case.experiment, RunConfig(), before_move)
    assert first.is_promoted
    assert first.reason == "the first of its name"
    second = promote(registry, ("p", 2), "champion", case.experiment, RunConfig(), before_move)
    assert not second.is_promoted
    assert before_moves == [{}], "called once, and the alias had not moved"
    assert "worse: loss" in second.reason
    assert registry.aliases("p") == {"champion": 1}
    again = promote(registry, ("p", 1), "champion", case.experiment, RunConfig())
    assert again.is_promoted
    assert again.reason == "held already: the first of its name"
    assert len(registry.history("p", "champion")) == 1


def test_a_model_with_other_inputs_is_kept_but_cannot_take_the_alias(
    exported: Any, tmp_path: Path
) -> None:
    case, other = exported["Pictures"], exported["Sequences"]
    holder = sealed(other, tmp_path / "holder")
    registry = TwoVersions(tmp_path, {1: holder, 2: case.place.bundle})
    registry.move_alias("p", "champion", 1, reason="the first of its name", after=None)
    decision = promote(registry, ("p", 2), "champion", case.experiment, RunConfig())
    assert not decision.is_promoted
    assert "version 1 held it, and whoever serves champion would break" in decision.reason
    assert re.search(r"was int64 \[samples, [\d, ]+\] and is absent", decision.reason)
    assert re.search(r"was absent and is float32 \[samples, [\d, ]+\]", decision.reason)
    assert decision.reason.endswith(
        f"move the alias by hand with holdfast alias p@2 champion --store {tmp_path}"
    )
    assert registry.aliases("p") == {"champion": 1}


@pytest.mark.parametrize("name", ["1/model.onnx", "manifest.json"])
def test_a_holder_that_somebody_spoilt_is_not_opened(
    exported: Any, tmp_path: Path, name: str
) -> None:
    case = exported["Pictures"]
    holder = sealed(case, tmp_path / "holder")
    (holder / name).write_bytes(b"no such thing")
    registry = TwoVersions(tmp_path, {1: holder, 2: case.place.bundle})
    registry.move_alias("p", "champion", 1, reason="the first of its name", after=None)
    decision = promote(registry, ("p", 2), "champion", case.experiment, RunConfig())
    assert not decision.is_promoted
    assert "version 1 held it, and cannot be compared: " in decision.reason
    assert name in decision.reason
    assert f"holdfast alias p@2 champion --store {tmp_path}" in decision.reason
    assert registry.aliases("p") == {"champion": 1}
