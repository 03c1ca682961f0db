"""What an experiment draws is the same in every process of its run."""

from __future__ import annotations

import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, random_split

from holdfast.training.configuration.schema import RunConfig, Split
from holdfast.training.errors import ExperimentError
from holdfast.training.exactness.seeding import derive_seed, seed_generators
from holdfast.training.experiment.building import build_experiment
from holdfast.training.experiment.loading import load_experiment
from holdfast.training.experiment.protocol import Context
from holdfast.training.stage import SEED_PURPOSES, StageArguments, prepared_stage
from tests.faults.campaign import HARD
from tests.faults.hard_experiment import Hard

CONFIG = RunConfig()
SEEDS = {purpose: derive_seed(0, purpose) for purpose in SEED_PURPOSES}


class Drawing(Hard):
    """Draws wherever it is asked for something, from each generator."""

    def __init__(self, context: Context) -> None:
        self.order = np.random.permutation(30).tolist()

    def dataset(self, split: Split) -> Any:
        rows = TensorDataset(torch.arange(30), torch.randn(30))
        parts = random_split(rows, [20, 5, 5])
        return parts[["train", "validation", "test"].index(split)]

    def model(self) -> nn.Module:
        features = nn.Module()
        features.register_buffer("frequencies", torch.randn(4), persistent=False)
        features.first = len(self.dataset("train")) + random.random()  # type: ignore[assignment]
        return features


def drawn(experiment: Any) -> list[Any]:
    """What it gives, by all that draws."""
    splits = [sorted(part.indices) for part in map(experiment.dataset, ("train", "validation"))]
    model = experiment.model()
    return [experiment.order, splits, model.frequencies.tolist(), model.first]


@pytest.mark.parametrize("num_before", [0, 1, 7])
def test_each_call_draws_the_same_whatever_was_drawn_before(num_before: int) -> None:
    seed_generators(1)
    wanted = drawn(build_experiment(Drawing, CONFIG, SEEDS))
    for seed in range(num_before):
        seed_generators(seed)
        torch.randn(3), np.random.rand(), random.random()
    experiment: Any = build_experiment(Drawing, CONFIG, SEEDS)
    experiment.dataset("validation")
    assert drawn(experiment) == wanted
    assert drawn(experiment) == wanted
    train, validation = wanted[1]
    assert set(train).isdisjoint(validation)


def test_nobody_else_is_disturbed() -> None:
    seed_generators(3)
    wanted = [torch.randn(2).tolist(), np.random.rand(), random.random()]
    seed_generators(3)
    drawn(build_experiment(Drawing, CONFIG, SEEDS))
    assert [torch.randn(2).tolist(), np.random.rand(), random.random()] == wanted


def test_another_seed_draws_otherwise() -> None:
    others = {purpose: derive_seed(1, purpose) for purpose in SEED_PURPOSES}
    one, other = (drawn(build_experiment(Drawing, CONFIG, seeds)) for seeds in (SEEDS, others))
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_a_run_without_a_seed_for_data_goes_on_as_it_began() -> None:
    older = {purpose: SEEDS[purpose] for purpose in ("experiment", "model", "order", "training")}
    seed_generators(5)
    wanted = drawn(Drawing(Context()))
    seed_generators(5)
    assert drawn(build_experiment(Drawing, CONFIG, older)) == wanted


def test_an_experiment_travels_to_loader_processes() -> None:
    experiment = build_experiment(Drawing, CONFIG, SEEDS)
    assert drawn(pickle.loads(pickle.dumps(experiment))) == drawn(experiment)


class Slotted(Drawing):
    """Has no room."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Bare:
    """Takes no attributes."""

    __slots__ = ("context",)

    def __init__(self, context: Context) -> None:
        self.context = context

    def dataset(self, split: Split) -> Any:
        return [split]

    def model(self) -> nn.Module:
        return nn.Identity()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.zeros(())

    score: Any = loss
    metrics: Any = loss


def test_a_class_with_slots_is_told_to_leave_them_out() -> None:
    assert drawn(build_experiment(Slotted, CONFIG, SEEDS))
    with pytest.raises(ExperimentError, match=r"Bare has __slots__.*leave __slots__ out"):
        build_experiment(Bare, CONFIG, SEEDS)


def test_what_a_module_draws_when_it_is_imported_is_the_same_everywhere(tmp_path: Path) -> None:
    text = f"{Path(__file__).read_text()}\nDRAWN = [random.random(), *np.random.rand(3)]\n"
    found = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "drawing_at_import.py"
        path.parent.mkdir()
        path.write_text(text)
        random.seed(folder)
        np.random.seed(len(found))
        before = random.getstate()
        experiment_class = load_experiment(f"{path}:Drawing")
        found.append(sys.modules[experiment_class.__module__].DRAWN)  # type: ignore[attr-defined]
        assert random.getstate() == before
    assert found[0] == found[1]


def test_the_seeds_of_a_run_are_those_that_it_was_begun_with(tmp_path: Path) -> None:
    arguments = StageArguments(HARD, tmp_path, "one", 1, overrides=("preemption.sources=[]",))
    with prepared_stage(arguments) as stage, stage.writing():
        assert stage.record.seeds == SEEDS
    kept = arguments.run.run_json.read_text().replace(f'"dataset": {SEEDS["dataset"]},', "")
    arguments.run.run_json.write_text(kept)
    with prepared_stage(arguments) as stage:
        assert "dataset" not in stage.record.seeds
        assert "dataset" not in vars(stage.experiment)
