"""The methods that docs/optimizers.md shows are methods of an experiment that is fit."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.training.rehearsal.acting import perform
from holdfast.training.rehearsal.request import RehearsalRequest, read_told
from holdfast.training.rehearsal.telling import Telling
from tests.documentation.pages import REPOSITORY
from tests.documentation.printed import blocks

BLOCKS = blocks(REPOSITORY / "docs" / "optimizers.md")
HEAD = """\
import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.generality.points import OnPoints, classification_rows


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        if IS_PAIR:
            self.critic, self.generator = nn.Linear(6, 1), nn.Linear(64, 6)
        else:
            self.net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))

    def forward(self, points):
        return self.critic(points).repeat(1, 2) if IS_PAIR else self.net(points)


def residual(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


class FromPage(OnPoints):
    def model(self):
        return Pair()

    def loss(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    def score(self, model, batch):
        return classification_rows(model(batch[0]), batch[1])

"""


def rehearsed(name: str, folder: Path, **asked: str) -> list[object]:
    method = "" if name == "composed" else BLOCKS[name]
    (folder / "page.py").write_text(f"IS_PAIR = {name == 'several'}\n{HEAD}{method}")
    request = RehearsalRequest(
        f"{folder / 'page.py'}:FromPage", str(folder), str(folder), 1, depth="step", **asked
    )
    with ExitStack() as stack:
        perform(request, Telling(request), stack)
    told = list(read_told(request.told))
    assert {line["name"] for line in told if line["kind"] == "done"} >= {"save and restore"}
    return [line["finding"] for line in told if line["kind"] == "finding"]


@pytest.mark.parametrize("name", ["groups", "rate", "step", "several", "closure"])
def test_a_method_of_the_page_is_fit(name: str, tmp_path: Path) -> None:
    assert rehearsed(name, tmp_path) == []


def test_the_composed_schedulers_of_the_page_are_fit(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(BLOCKS["composed"])
    assert rehearsed("composed", tmp_path, config_file=str(tmp_path / "run.toml")) == []


def test_each_method_of_the_page_is_tried() -> None:
    assert BLOCKS.keys() == {"groups", "rate", "step", "several", "closure", "composed"}
