"""Quantization-aware training: observers whose buffers begin infinite, and grow.

The prepared model is trained, averaged, chosen among and tested as any other. What is not to be had
is its bundle: torch.onnx cannot translate torch.ao's fused observers, and the export says so in one
line. A twin of plain arithmetic, by ``merged``, does not help: parity compares with the trained
model in double precision, which those observers do not compute in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.functional import cross_entropy

from holdfast.training.checkpointing.manifest import STATE_NAME
from holdfast.training.runs.stored_json import STATE, read_json
from tests.faults.campaign import Training
from tests.generality.harness import QUICK_EXPORT, assert_exact, assert_published
from tests.generality.points import OnPoints, classification_rows

SCALE = "1.weight_fake_quant.scale"


class Observed(nn.Sequential):
    """Eager mode of torch.ao; what is evaluated is rounded, and observed no more."""

    def __init__(self) -> None:
        layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)]
        super().__init__(quantization.QuantStub(), *layers, quantization.DeQuantStub())
        self.qconfig = quantization.get_default_qat_qconfig("fbgemm")

    def train(self, mode: bool = True) -> Self:
        change = quantization.enable_observer if mode else quantization.disable_observer
        return super().train(mode).apply(change)


class Quantized(OnPoints):
    def model(self) -> nn.Module:
        model: nn.Module = quantization.prepare_qat(Observed(), inplace=True)
        return model

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return classification_rows(model(batch[0]), batch[1])


@pytest.mark.slow
def test_observers_that_grow_are_exact_to_the_champion_and_not_exported(tmp_path: Path) -> None:
    experiment = f"{__file__}:Quantized"
    run = assert_exact(experiment, tmp_path)
    last = max(run.checkpoints.glob("step-*"))
    weights, averages = (load_file(last / f"{kind}.safetensors") for kind in ("model", "ema"))
    # A model begins with one scale for the layer, and ends with one for each channel.
    assert weights[SCALE].shape == averages[f"decay-0.9/{SCALE}"].shape == (16,)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    for stage in ("candidates", "evaluate"):
        segment = calm.start(stage=stage)
        assert segment.finish() == 0, segment.errors
    export = calm.start(stage="export")
    assert export.finish() == 1
    averaged = load_file(run.candidates / "ema-decay-0.9" / "model.safetensors")
    assert averaged[SCALE].shape == (16,)
    [told] = [line for line in export.errors if line.startswith("error: ")]
    assert "torch.onnx cannot translate the model" in told
    assert "leave onnx out of export.formats" in told


class DelayedScale(nn.Linear):
    """Scales its input by the largest value seen so far, kept as extra state: as fp8 layers do."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs)
        self.largest = 1.0
        self.newest = {"weight": 0.0, "input": 0.0}  # gone through in this order

    def forward(self, x: Tensor) -> Tensor:
        scaled = super().forward(x / self.largest)
        if self.training:
            self.largest = max(self.largest, float(x.detach().abs().max()))
            oldest = next(iter(self.newest))
            self.newest.pop(oldest)
            self.newest[oldest] = float(x.detach().mean())
        return scaled

    def get_extra_state(self) -> Any:
        return {"largest": self.largest, "newest": dict(self.newest)}

    def set_extra_state(self, state: Any) -> None:
        self.largest, self.newest = state["largest"], dict(state["newest"])


class Scaled(OnPoints):
    def model(self) -> nn.Module:
        return nn.Sequential(DelayedScale(6, 16), nn.ReLU(), nn.Linear(16, 2))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return classification_rows(model(batch[0]), batch[1])


@pytest.mark.slow
def test_state_that_is_no_tensor_goes_with_averages_and_into_the_export(tmp_path: Path) -> None:
    experiment = f"{__file__}:Scaled"
    run = assert_exact(experiment, tmp_path)
    calm = Training(tmp_path / "calm", "one", experiment, QUICK_EXPORT)
    assert_published(calm)  # with parity: the scale is in the graph
    state = read_json(max(run.checkpoints.glob("step-*")) / STATE_NAME, STATE)
    assert state["model"]["0._extra_state"]["largest"] > 2
