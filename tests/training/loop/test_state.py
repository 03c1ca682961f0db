"""Weights that are not of this model: one line that names what differs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from holdfast.training.checkpointing.model_weights import load_model
from holdfast.training.errors import CheckpointMismatchError


def layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))


def refusal(model: nn.Module, weights: dict[str, torch.Tensor]) -> str:
    with pytest.raises(CheckpointMismatchError) as caught:
        load_model(model, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_shapes_that_differ_are_named_and_the_others_counted() -> None:
    told = refusal(layers(4, 8, 8, 2), layers(4, 6, 6, 2).state_dict())
    assert (
        "0.weight is [6, 4] there, [8, 4] here; 0.bias is [6] there, [8] here; "
        "1.weight is [6, 6] there, [8, 8] here; and 2 more: use the settings"
    ) in told


def test_a_parameter_that_one_of_them_lacks_is_named() -> None:
    told = refusal(layers(4, 2), layers(4, 2, 2).state_dict())
    assert "1.weight is [2, 2] there, absent here; 1.bias is [2] there, absent here: use" in told
