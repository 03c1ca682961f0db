"""Models of many kinds: exported in all formats and proved, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from holdfast.training.averages.averaging import write_weights
from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.errors import ExportError
from holdfast.training.experiment.protocol import Context
from holdfast.training.export.artifacts import chosen_formats, open_champion, write_artifacts
from holdfast.training.export.formats import formats
from holdfast.training.export.protocol import Place
from holdfast.training.parity.champion import Champion
from holdfast.training.parity.golden import write_golden
from holdfast.training.parity.parity import Int8Limits, check_artifact, check_comparison
from tests.training.parity import odd_exports

ALL = ("weights", "onnx", "exported_program", "torchscript")
WITHOUT_ONNX = ("weights", "exported_program", "torchscript")


def exported(experiment: Any, folder: Path, names: tuple[str, ...]) -> tuple[Champion, Place]:
    torch.manual_seed(1)
    path = folder / "model.safetensors"
    write_weights(path, experiment.model().state_dict())
    source, place = open_champion(
        experiment, path, ExportConfig(formats=names), folder / "bundle", folder / "scratch"
    )
    write_artifacts(source, place, names)
    return Champion.load(experiment, path, 16), place


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("OneDict", ALL),
        ("Keywords", ALL),
        ("Anchors", ALL),
        ("Bytes", ALL),
        ("Flags", ALL),
        *(
            pytest.param(name, ALL, marks=pytest.mark.slow)
            for name in ("Fields", "Shorts", "SignedBytes")
        ),
        ("Bfloat16", WITHOUT_ONNX),
        ("WithoutOnnx", WITHOUT_ONNX[:1]),
    ],
)
def test_every_format_is_the_champion(name: str, names: tuple[str, ...], tmp_path: Path) -> None:
    experiment = getattr(odd_exports, name)(Context())
    champion, place = exported(experiment, tmp_path, names)
    reports = [check_comparison(champion)]
    for form in names:
        reports.append(check_artifact(champion, form, formats()[form], place, Int8Limits()))
    assert [finding for report in reports for finding in report.findings] == []
    write_golden(tmp_path / "golden", champion, 4)
    for path in (tmp_path / "golden").glob("*.npy"):
        assert np.load(path, allow_pickle=False).dtype.kind in "fiub"


def test_names_of_inputs_and_outputs_are_those_of_the_dicts(tmp_path: Path) -> None:
    champion, _ = exported(odd_exports.Keywords(Context()), tmp_path, ("weights",))
    assert [port.name for port in champion.interface.inputs] == ["right", "left"]
    assert [port.name for port in champion.interface.outputs] == ["logits", "total"]


class Dead(odd_exports.Anchors):
    """Its logits became the same for all samples, whatever else varies not by design."""

    is_dead = False

    class net(odd_exports.Net):
        def forward(self, x: torch.Tensor) -> Any:
            return self.logits(x), x.sum(1, keepdim=True)

    def model(self) -> nn.Module:
        model = super().model()
        if self.is_dead:
            torch.nn.init.zeros_(model.first.weight)  # type: ignore[union-attr, arg-type]
        return model


def test_an_output_that_died_in_training_is_found_beside_one_that_lives(tmp_path: Path) -> None:
    experiment = Dead(Context())
    experiment.is_dead = True
    torch.manual_seed(1)
    write_weights(tmp_path / "model.safetensors", experiment.model().state_dict())
    experiment.is_dead = False
    champion = Champion.load(experiment, tmp_path / "model.safetensors", 16)
    told = [str(finding) for finding in check_comparison(champion).findings]
    assert "variation: output_0: is the same for all 40 test samples" in told
    assert not any("output_1" in finding for finding in told)


class AllConstant(odd_exports.Anchors):
    """Nothing it returns depends on its input."""

    class net(odd_exports.Net):
        def forward(self, x: torch.Tensor) -> Any:
            return self.logits(torch.zeros_like(x)), x[:, :2] * 0.0 + 1.0


def test_metrics_of_a_report_are_numbers_whatever_an_experiment_returns(tmp_path: Path) -> None:
    champion, place = exported(odd_exports.TensorMetrics(Context()), tmp_path, ("weights",))
    report = check_artifact(champion, "weights", formats()["weights"], place, Int8Limits())
    assert report.findings == []
    assert json.loads(json.dumps(report.metrics)).keys() == {"loss", "worst"}


class OneSample(odd_exports.Base):
    def dataset(self, split: str) -> Any:
        return Subset(super().dataset(split), range(1 if split == "test" else 8))


def test_one_test_sample_is_told_to_be_too_few(tmp_path: Path) -> None:
    champion, _ = exported(OneSample(Context()), tmp_path, ("weights",))
    [finding] = check_comparison(champion).findings
    assert finding.check == "variation"
    assert "cannot vary over one test sample" in finding.message


def test_where_nothing_varies_nothing_is_proved(tmp_path: Path) -> None:
    champion, _ = exported(AllConstant(Context()), tmp_path, ("weights",))
    assert "variation" in {finding.check for finding in check_comparison(champion).findings}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Bfloat16", "bfloat16, which ONNX Runtime does not compute with on a CPU: leave onnx out"),
        ("Ragged", "samples of the input x have the shape"),
        ("WithoutOnnx", "leave onnx out of export.formats"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        exported(getattr(odd_exports, name)(Context()), tmp_path, ALL)
    message = str(caught.value)
    assert told in message
    assert "\x1b" not in message
    assert "\n" not in message
    assert len(message) < 600


def test_formats_are_those_that_were_asked_for_and_what_they_need() -> None:
    def chosen(*names: Any) -> tuple[str, ...]:
        return chosen_formats(ExportConfig(formats=names))

    assert chosen("torchscript") == ("weights", "torchscript")
    assert chosen() == ("weights",)
    assert chosen("onnx_int8") == ("weights", "onnx", "onnx_int8")
    assert chosen_formats(ExportConfig()) == ALL
