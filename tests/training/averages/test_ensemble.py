"""Several models as one: what it returns, what it is called like, what it refuses."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from holdfast.training.averages.averaging import write_weights
from holdfast.training.averages.ensemble import (
    Ensemble,
    experiment_of,
    mean_of,
    num_members,
    require_one_graph,
    write_ensemble,
)
from holdfast.training.checkpointing.model_weights import load_model
from holdfast.training.errors import ConfigError
from holdfast.training.experiment.model_call import forward_parameters

Pair = namedtuple("Pair", ["logits", "label"])


class Tied(nn.Module):
    """Two layers of one weight, and a count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, points: Tensor, scale: float = 1.0) -> Tensor:
        return self.second(self.first(points)) * scale


class Task:
    """What an ensemble asks of an experiment."""

    def __init__(self) -> None:
        self.scored: list[int] = []

    def model(self) -> nn.Module:
        return Tied()


class InGraphs(Task):
    def export_parts(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("nests", "expected"),
    [
        ([torch.tensor([1.0]), torch.tensor([3.0])], torch.tensor([2.0])),
        ([torch.tensor([1]), torch.tensor([3])], torch.tensor([3])),
        ([torch.tensor([True]), torch.tensor([False])], torch.tensor([False])),
    ],
)
def test_the_mean_is_taken_of_floating_tensors_alone(nests: list[Tensor], expected: Tensor) -> None:
    assert torch.equal(mean_of(nests), expected)
    assert torch.equal(mean_of([{"x": one} for one in nests])["x"], expected)
    assert torch.equal(mean_of([(one, None) for one in nests])[0], expected)
    assert torch.equal(mean_of([Pair(one, one) for one in nests]).label, expected)
    assert torch.equal(mean_of([[{"x": one}] for one in nests])[0]["x"], expected)


def test_an_ensemble_is_read_from_its_members_files(tmp_path: Path) -> None:
    models, paths = [], []
    for number in range(3):
        torch.manual_seed(number)
        models.append(Tied().eval())
        paths.append(tmp_path / f"{number}.safetensors")
        write_weights(paths[-1], models[-1].state_dict())
    digest = write_ensemble(tmp_path / "all.safetensors", paths)
    again = write_ensemble(tmp_path / "again.safetensors", paths)
    assert digest == again
    stored = load_file(tmp_path / "all.safetensors")
    assert set(stored) == {
        f"members.{number}.{name}"
        for number in range(3)
        for name in ("first.weight", "first.bias", "second.bias", "count")
    }
    ensemble = Ensemble(Tied() for _ in range(3))
    ties = {f"members.{n}.second.weight": stored[f"members.{n}.first.weight"] for n in range(3)}
    load_model(ensemble, {**stored, **ties})
    points = torch.randn(4, 3)
    wanted = torch.stack([model(points, scale=2.0) for model in models]).mean(0)
    assert torch.equal(ensemble.eval()(points, scale=2.0), wanted)
    assert list(forward_parameters(ensemble)) == ["points", "scale"]


def test_an_experiment_of_an_ensemble_is_a_copy_that_builds_its_members() -> None:
    task: Any = Task()
    assert experiment_of(task, "best") is task
    several: Any = experiment_of(task, "ensemble-top-4")
    assert type(several) is Task
    assert several.scored is task.scored
    assert len(several.model().members) == 4
    assert isinstance(task.model(), Tied)


@pytest.mark.parametrize(
    ("name", "num"), [("ensemble-top-5", 5), ("average-top-5", None), ("ensemble-top-5-bn", None)]
)
def test_an_ensemble_is_known_by_its_name(name: str, num: int | None) -> None:
    assert num_members(name) == num


def test_what_cannot_be_an_ensemble_is_refused() -> None:
    task: Any = InGraphs()
    with pytest.raises(ConfigError, match=r"'ensemble'.*InGraphs is served as several graphs"):
        require_one_graph(task)
    with pytest.raises(AttributeError, match=r"no 'encode'.*can only be called.*'ensemble' out of"):
        Ensemble([Tied()]).encode(1)
