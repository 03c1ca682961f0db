"""Moving averages of the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.training.averages.ema import MovingAverages, Track, tracks_of
from holdfast.training.averages.posthoc_ema import power_weight
from holdfast.training.configuration.schema import EmaConfig
from holdfast.training.errors import CheckpointMismatchError, ExperimentError, InputError

CONFIG = EmaConfig(decays=(0.9, 0.99), posthoc_gammas=(6.94,))


class Mixed(nn.Module):
    """Every kind of tensor that a state dict may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.half = nn.Linear(3, 3, dtype=torch.bfloat16)
        self.double = nn.Linear(3, 3, dtype=torch.float64)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor([0.1, 3.3]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", torch.zeros(0))


@torch.no_grad()
def wander(model: nn.Module, seed: int) -> None:
    """What a step does to parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    model.norm.running_mean.add_(torch.randn(3, generator=generator))
    model.norm.num_batches_tracked.add_(1)
    model.mask.logical_not_()


def trained(num_steps: int, config: EmaConfig = CONFIG) -> tuple[Mixed, MovingAverages]:
    torch.manual_seed(0)
    model = Mixed()
    averages = MovingAverages(model, config)
    for step in range(1, num_steps + 1):
        wander(model, step)
        averages.update(model, step)
    return model, averages


def test_averages_follow_their_definition() -> None:
    torch.manual_seed(0)
    model = Mixed()
    averages = MovingAverages(model, CONFIG)
    expected = {track: model.first.weight.detach().double() for track in averages.names}
    for step in range(1, 30):
        wander(model, step)
        averages.update(model, step)
        for track in tracks_of(CONFIG):
            change = model.first.weight.detach().double() - expected[track.name]
            expected[track.name] = expected[track.name] + track.weight(step) * change
    for name, average in expected.items():
        found = averages.tensors()[f"{name}/first.weight"].double()
        torch.testing.assert_close(found, average, rtol=1e-5, atol=1e-5)


def test_the_warm_up_of_a_decay() -> None:
    track = Track("decay", 0.99, has_warmup=True)
    assert track.weight(1) == 1 - 2 / 11
    assert track.weight(8) == 1 - 9 / 18
    assert track.weight(10**6) == 1 - 0.99
    assert Track("decay", 0.99).weight(1) == 1 - 0.99


def test_a_power_function_starts_at_the_first_weights() -> None:
    model, averages = trained(1)
    assert power_weight(6.94, 1) == 1.0
    assert torch.equal(averages.weights("gamma-6.94")["first.bias"], model.first.bias)


def test_tracks_have_names_that_tell_them_apart() -> None:
    config = EmaConfig(decays=(0.999, 0.99999999), posthoc_gammas=(16.97, 7.0))
    assert [track.name for track in tracks_of(config)] == [
        "decay-0.999",
        "decay-0.99999999",
        "gamma-16.97",
        "gamma-7.0",
    ]


def test_half_precision_is_averaged_in_fp32_and_given_back_in_its_type() -> None:
    _, averages = trained(3)
    kept, given = averages.tensors(), averages.weights("decay-0.9")
    assert kept["decay-0.9/half.weight"].dtype == torch.float32
    assert given["half.weight"].dtype == torch.bfloat16
    assert kept["decay-0.9/double.weight"].dtype == given["double.weight"].dtype == torch.float64


def test_a_small_step_moves_the_average_of_a_half_precision_weight() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(model.weight)
    averages = MovingAverages(model, EmaConfig(decays=(0.9999,), has_warmup=False))
    nn.init.ones_(model.weight)
    for step in range(1, 20_001):
        averages.update(model, step)
    found = averages.tensors()["decay-0.9999/weight"].item()
    assert found == pytest.approx(1 - 0.9999**20_000, rel=1e-3)


def test_integers_are_copied_and_running_statistics_averaged() -> None:
    model, averages = trained(5)
    weights = averages.weights("decay-0.99")
    assert weights["norm.num_batches_tracked"].item() == 5
    assert torch.equal(weights["mask"], model.mask)
    assert not torch.equal(weights["norm.running_mean"], model.norm.running_mean)


def test_constants_stay_as_they_are_to_the_bit() -> None:
    model, averages = trained(40)
    for track in averages.names:
        assert torch.equal(averages.weights(track)["scale"], model.scale)


def test_all_names_of_the_state_dict_are_there_and_no_others() -> None:
    model, averages = trained(1)
    assert list(averages.weights("decay-0.9")) == list(model.state_dict())
    assert len(averages.tensors()) == 3 * len(model.state_dict())


def test_tied_tensors_are_updated_once_and_stay_tied() -> None:
    _, averages = trained(2)
    kept, given = averages.tensors(), averages.weights("decay-0.9")
    assert kept["decay-0.9/tied.weight"] is kept["decay-0.9/first.weight"]
    assert given["tied.weight"] is given["first.weight"]
    untied = nn.Linear(3, 3)
    with torch.no_grad():
        untied.weight.copy_(Mixed().first.weight)
    lone = MovingAverages(untied, CONFIG)
    assert lone.tensors()["decay-0.9/weight"] is not lone.tensors()["decay-0.99/weight"]


def test_a_restore_goes_on_to_the_same_bits() -> None:
    model, expected = trained(20)
    other_model, resumed = trained(8)
    saved = {name: tensor.clone() for name, tensor in resumed.tensors().items()}
    state = resumed.state()
    resumed = MovingAverages(other_model, CONFIG)
    resumed.restore(saved, state)
    for step in range(9, 21):
        wander(other_model, step)
        resumed.update(other_model, step)
    assert torch.equal(model.first.weight, other_model.first.weight)
    for name, tensor in expected.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_a_restore_into_other_tracks_or_shapes_is_refused_and_changes_nothing() -> None:
    _, averages = trained(3)
    before = {name: tensor.clone() for name, tensor in averages.tensors().items()}
    with pytest.raises(CheckpointMismatchError, match=r"\['decay-0\.5'\]"):
        averages.restore({}, {"tracks": ["decay-0.5"]})
    _, other = trained(9)
    damaged: dict[str, Tensor] = {**other.tensors(), "gamma-6.94/first.bias": torch.zeros(4)}
    with pytest.raises(CheckpointMismatchError, match=r"first\.bias .*\[3\].* holds .*\[4\]"):
        averages.restore(damaged, other.state())
    del damaged["gamma-6.94/first.bias"]
    with pytest.raises(CheckpointMismatchError, match="holds nothing"):
        averages.restore(damaged, other.state())
    assert all(torch.equal(before[n], t) for n, t in averages.tensors().items())


def test_applied_weights_are_taken_back_to_the_bit() -> None:
    model, averages = trained(5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = averages.weights("decay-0.9")
    with averages.applied(model, "decay-0.9"):
        assert all(torch.equal(expected[n], t) for n, t in model.state_dict().items())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), averages.applied(model, "decay-0.9"):
        _ = 1 / 0
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_buffer_that_is_assigned_anew_is_followed() -> None:
    model = Mixed()
    averages = MovingAverages(model, EmaConfig(decays=(0.0,), has_warmup=False))
    model.scale = torch.tensor([5.0, 6.0])
    averages.update(model, 1)
    assert averages.weights("decay-0.0")["scale"].tolist() == [5.0, 6.0]


def test_a_buffer_that_has_grown_since_the_update_is_applied_and_taken_back() -> None:
    model = Mixed()
    averages = MovingAverages(model, EmaConfig(decays=(0.0,), has_warmup=False))
    model.scale = torch.tensor([5.0, 6.0])
    averages.update(model, 1)
    model.scale = torch.tensor([5.0, 6.0, 7.0])
    with averages.applied(model, "decay-0.0"):
        assert model.scale.tolist() == [5.0, 6.0]
    assert model.scale.tolist() == [5.0, 6.0, 7.0]


def test_an_unknown_track_is_refused_with_those_that_are_kept() -> None:
    _, averages = trained(1)
    with pytest.raises(InputError, match=r"'decay-0\.5'; kept are \['decay-0\.9'"):
        averages.weights("decay-0.5")


def test_a_state_dict_with_a_tensor_from_nowhere_is_refused() -> None:
    class Odd(nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "extra"] = torch.zeros(1)

    with pytest.raises(ExperimentError, match=r"Odd has extra in its state dict"):
        MovingAverages(Odd(1, 1), CONFIG)
    assert MovingAverages(Odd(1, 1), EmaConfig(decays=())).tensors() == {}


def test_no_tracks_cost_nothing() -> None:
    _, averages = trained(3, EmaConfig(decays=()))
    assert averages.names == ()
    assert averages.tensors() == {}
    averages.restore({}, averages.state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_update_never_waits_for_the_gpu() -> None:
    model = Mixed().cuda()
    averages = MovingAverages(model, CONFIG)
    averages.update(model, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        averages.update(model, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
