from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from holdfast.training.loop.evaluation import as_arrays, move


class Target(NamedTuple):
    label: Any
    weight: Any


class Graph:
    """As libraries of graphs have it: a batch that moves itself."""

    def __init__(self, device: str) -> None:
        self.device = device

    def to(self, device: torch.device) -> Graph:
        return Graph(str(device))


def test_any_nest_is_moved_and_keeps_its_kinds() -> None:
    tensor = torch.ones(2)
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    nest = (tensor, [Target(tensor, {"a": tensor})], packed, "text", None, 3, Graph("cpu"))
    moved: Any = move(nest, torch.device("meta"))
    assert moved[0].is_meta
    [target] = moved[1]
    assert isinstance(target, Target)
    assert target.label.is_meta
    assert target.weight["a"].is_meta
    assert isinstance(moved[2], PackedSequence)
    assert moved[2].data.is_meta
    assert moved[3:6] == ("text", None, 3)
    assert moved[6].device == "meta"


def test_records_that_numpy_lacks_become_fp32() -> None:
    records: dict[str, Tensor] = {"loss": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)}
    found = as_arrays(records)["loss"]
    assert found.dtype.name == "float32"
    assert found.tolist() == [1.5, 2.5]
