"""A TrainState that was written and read goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.training.averages.averaging import write_weights
from holdfast.training.averages.ema import MovingAverages
from holdfast.training.checkpointing.finite import non_finite
from holdfast.training.checkpointing.local_files import read_file
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.configuration.schema import (
    EmaConfig,
    OptimizerConfig,
    SchedulerConfig,
    WarmupConfig,
)
from holdfast.training.errors import CheckpointMismatchError
from holdfast.training.loop.state import TrainState
from holdfast.training.optimizers.building import CONFIGURED, build_optimizer
from holdfast.training.optimizers.schedule import Schedule
from tests.training.far_memory import FarReader


class Changing(nn.Module):
    """Buffers that begin as None, or as something else than what they become."""

    late: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("late", None)
        self.register_buffer("grows", torch.zeros(1))
        self.register_buffer("widens", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        self.register_buffer("lies", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.late = x.detach().mean(0)
            self.grows = torch.cat([self.grows, x.detach()[:1, 0]])
            self.widens = self.widens + 0.5
            self.lies = torch.ones(3, 2).t() * x.detach().mean()
        return self.layer(x)


class Relaid(nn.Module):
    """A weight whose memory is laid out anew in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.weight.data = self.layer.weight.data.to(memory_format=torch.channels_last)
        return self.layer(x.view(-1, 3, 3, 3))


class Unfreezing(nn.Module):
    """Its first layer is frozen at first, its last layer later on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2))
        self.layers[0].requires_grad_(False)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 2:
            self.layers[0].requires_grad_(True)
            self.layers[3].requires_grad_(False)
        return self.layers(x)


def state_of(build: Callable[[], nn.Module]) -> TrainState:
    torch.manual_seed(0)
    model = build()
    optimizer = build_optimizer(OptimizerConfig(args={"lr": 0.1}), model)
    return TrainState(
        model=model,
        optimizers={CONFIGURED: optimizer},
        schedule=Schedule({CONFIGURED: optimizer}, SchedulerConfig(), WarmupConfig(), 4),
        averages=MovingAverages(model, EmaConfig(decays=(0.9, 0.5), has_warmup=False)),
        gradient_scaler=torch.amp.GradScaler("cpu", enabled=False),
        loss_sum=torch.zeros((), dtype=torch.float64),
    )


def advance(state: TrainState, first: int, end: int) -> None:
    from holdfast.training.optimizers.optimizer_state import join_optimizer

    optimizer = state.optimizers[CONFIGURED]
    for step in range(first, end):
        inputs = torch.randn(27, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        state.model(inputs).square().mean().backward()
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameter in state.model.parameters():
            if parameter.requires_grad and id(parameter) not in known:
                join_optimizer(optimizer, parameter)
        optimizer.step()
        state.averages.update(state.model, step + 1)


def written_and_read(
    captured: tuple[dict[str, dict[str, Tensor]], Any], folder: Path, *, is_far: bool = False
) -> tuple[dict[str, dict[str, Tensor]], Any]:
    tensors, values = captured
    for stem, inner in tensors.items():
        (folder / stem).unlink(missing_ok=True)
        write_weights(folder / stem, inner)
    read = {}
    for stem in tensors:
        device = FarReader() if is_far and stem != "state" else None
        content, _ = read_file(folder / stem, "sha256", device=device)
        read[stem] = parse_tensors(content, stem)
    return read, json.loads(json.dumps(values))


def file_bytes(state: TrainState, folder: Path) -> dict[str, bytes]:
    tensors, values = state.capture()
    written_and_read((tensors, values), folder)
    files = {stem: (folder / stem).read_bytes() for stem in tensors}
    return {**files, "values": json.dumps(values, sort_keys=True).encode()}


@pytest.mark.parametrize("is_far", [False, True], ids=["memory", "device"])
@pytest.mark.parametrize("build", [Changing, Relaid, Unfreezing])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_state_that_was_restored_goes_on_with_the_same_bytes(
    build: Callable[[], nn.Module], stop: int, is_far: bool, tmp_path: Path
) -> None:
    calm, cut = state_of(build), state_of(build)
    advance(calm, 0, 6)
    advance(cut, 0, stop)
    captured = written_and_read(cut.capture(), tmp_path, is_far=is_far)
    resumed = state_of(build)
    resumed.restore(*captured)
    if isinstance(resumed.model, Unfreezing):
        resumed.model.num_calls = stop
    for name, tensor in cut.model.state_dict().items():
        found = resumed.model.state_dict()[name]
        assert (found.dtype, found.stride()) == (tensor.dtype, tensor.stride()), name
    for one, two in zip(cut.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.requires_grad == two.requires_grad
    advance(resumed, stop, 6)
    assert file_bytes(resumed, tmp_path) == file_bytes(calm, tmp_path)


def test_what_does_not_change_is_not_written(tmp_path: Path) -> None:
    state = state_of(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    advance(state, 0, 2)
    assert not {"layouts", "requires_grad"} & set(json.loads(file_bytes(state, tmp_path)["values"]))


def test_weights_of_another_type_are_refused_and_not_cast() -> None:
    state, other = state_of(lambda: nn.Linear(3, 2)), state_of(lambda: nn.Linear(3, 2).double())
    tensors, values = other.capture()
    with pytest.raises(CheckpointMismatchError, match=r"weight is torch.float64 there, torch.flo"):
        state.restore(tensors, values)


def test_the_average_of_a_mask_is_the_mask() -> None:
    state = state_of(Changing)
    advance(state, 0, 3)
    for average in ("decay-0.9", "decay-0.5"):
        assert torch.equal(state.averages.tensors()[f"{average}/mask"], state.model.mask)  # type: ignore[arg-type]


def test_infinities_of_buffers_are_fine_and_those_of_weights_are_not() -> None:
    state = state_of(Changing)
    advance(state, 0, 2)

    def bad() -> list[str]:
        tensors, _ = state.capture()
        names, followed = state.must_be_finite(tensors), state.finite_as()
        excused = {name for name in followed if non_finite({"": tensors["model"][followed[name]]})}
        return [
            f"{stem}.{name}"
            for stem in names
            for name in non_finite(tensors[stem])
            if name in names[stem] and name not in excused
        ]

    assert bad() == []
    state.optimizers[CONFIGURED].state[state.model.layer.bias]["exp_avg"][1] = float("nan")  # type: ignore[index, union-attr]
    state.averages.tensors()["decay-0.9/layer.weight"][0, 0] = float("inf")
    assert bad() == [
        "optimizer.layer.bias/exp_avg",
        "ema.decay-0.9/layer.weight",
    ]
