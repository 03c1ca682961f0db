"""The turbofan network: size, scaler, gradients, export."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from holdfast.training.experiments.turbofan.data import (
    Floats,
    read_test_engines,
    read_training_engines,
)
from holdfast.training.experiments.turbofan.model import (
    ConditionScaler,
    ScalerParameters,
    TurbofanModel,
    fit_scaler,
)
from holdfast.training.experiments.turbofan.synthetic import Fleet, write_fleet


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Floats:
    path = tmp_path_factory.mktemp("six")
    write_fleet(path, Fleet(subset="FD002", num_train=6, num_test=1))
    return read_training_engines(path, "FD002").rows


@pytest.fixture
def model(rows: Floats) -> TurbofanModel:
    torch.manual_seed(0)
    return TurbofanModel(fit_scaler(rows), dropout=0.2, rul_scale=125.0)


def windows(rows: Floats, num: int) -> torch.Tensor:
    return torch.from_numpy(rows[: num * 30].astype(np.float32)).view(num, 30, 17)


def test_the_network_has_about_three_and_a_half_million_parameters(model: TurbofanModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_497_220


def test_every_parameter_gets_a_gradient(model: TurbofanModel, rows: Floats) -> None:
    rul, health = model(windows(rows, 4))
    (rul.square().sum() + health.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_rows_are_standardised_within_their_condition(rows: Floats) -> None:
    scaler = ConditionScaler(fit_scaler(rows))
    raw = torch.from_numpy(rows)[None]
    condition, scaled = scaler.condition(raw)[0], scaler(raw)[0]
    assert torch.unique(condition).tolist() == [0, 1, 2, 3, 4, 5]
    for number in range(6):
        members = scaled[condition == number]
        torch.testing.assert_close(members.mean(0), torch.zeros(17).double(), rtol=0, atol=1e-9)
        deviation = members.std(0, correction=0)
        assert ((deviation - 1).abs() < 1e-9).logical_or(deviation < 1e-9).all()


def test_a_feature_that_does_not_vary_is_divided_by_one() -> None:
    rows = np.tile(np.arange(17.0) + 1 / 3, (50, 1))
    parameters = fit_scaler(rows)
    assert (parameters.deviations == 1).all()
    scaled = ConditionScaler(parameters)(torch.from_numpy(rows)[None])
    assert scaled.abs().max() < 1e-12


def test_scaling_is_done_in_double_precision() -> None:
    # A speed that varies by a hundredth around 2388: fp32 arithmetic would lose a digit of it.
    means, deviations = np.full((1, 17), 2388.06), np.full((1, 17), 0.071)
    scaler = ConditionScaler(ScalerParameters(np.full((1, 3), 2388.06), means, deviations))
    raw = torch.full((1, 1, 17), 2388.11)
    expected = (float(raw[0, 0, 0]) - 2388.06) / 0.071
    scaled = scaler(raw)
    assert scaled.dtype == torch.float64
    assert float(scaled[0, 0, 0]) == pytest.approx(expected, rel=1e-12)


def test_scaler_parameters_are_double_precision_buffers_of_the_state(
    model: TurbofanModel,
) -> None:
    state = model.state_dict()
    for name in ("centroids", "means", "deviations"):
        assert state[f"scaler.{name}"].dtype == torch.float64


def test_a_window_does_not_depend_on_its_neighbours(model: TurbofanModel, rows: Floats) -> None:
    batch = windows(rows, 4)
    model.eval()
    with torch.no_grad():
        alone = model(batch[:1])
        disturbed = model(torch.cat([batch[:1], torch.full_like(batch[1:], float("nan"))]))
    for one, other in zip(alone, disturbed, strict=True):
        torch.testing.assert_close(other[:1], one)
        assert other[1:].isnan().all()


def test_a_trace_takes_any_batch_and_computes_the_same(model: TurbofanModel, rows: Floats) -> None:
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (windows(rows, 2),))  # type: ignore[no-untyped-call]
    reference = copy.deepcopy(model).double()
    with torch.no_grad():
        for num in (1, 3, 7):
            for got, expected in zip(
                traced(windows(rows, num)), reference(windows(rows, num)), strict=True
            ):
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_an_onnx_export_takes_any_batch_and_computes_the_same(
    model: TurbofanModel, rows: Floats, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model.eval()
    dimension = torch.export.Dim("batch", min=1, max=65536)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (windows(rows, 4),), dynamic_shapes=({0: dimension},))
        exported = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert exported is not None
    path = tmp_path / "model.onnx"
    exported.save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for num in (1, 3, 7):
        batch = windows(rows, num)
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(batch)
        for got, want in zip(session.run(None, {name: batch.numpy()}), expected, strict=True):
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("subset", "num"), [("FD001", 1), ("FD002", 6)])
def test_nearest_conditions_are_those_of_the_rounded_settings(
    shared_data: Path, subset: str, num: int
) -> None:
    train = read_training_engines(shared_data / "cmapss", subset).rows
    scaler = ConditionScaler(fit_scaler(train))
    assert len(scaler.centroids) == num
    known = np.unique(train[:, :3].round(), axis=0)
    for rows in (train, read_test_engines(shared_data / "cmapss", subset).rows):
        number = (rows[:, None, :3].round() == known).all(-1).argmax(-1)
        raw = torch.from_numpy(rows.astype(np.float32))[None]
        assert np.array_equal(scaler.condition(raw)[0].numpy(), number)
