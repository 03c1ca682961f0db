"""The champion's file: tied weights, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from holdfast.training.averages.averaging import write_weights
from holdfast.training.errors import ExportError
from holdfast.training.export.weights import load_champion, read_tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.scorer = nn.Linear(3, 5, bias=False)
        self.scorer.weight = self.embedding.weight


def test_tied_weights_are_there_under_each_name_and_stay_tied(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "model.safetensors"
    write_weights(path, model.state_dict())
    assert set(read_tensors(path)) == {"embedding.weight", "scorer.weight"}
    loaded = load_champion(path, Tied())
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)  # type: ignore[union-attr, arg-type]
    assert loaded.scorer.weight is loaded.embedding.weight  # type: ignore[union-attr]


def test_a_file_that_safetensors_itself_wrote_is_read(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "model.safetensors"
    save_model(model, str(path))
    loaded = load_champion(path, Tied())
    assert torch.equal(loaded.scorer.weight, model.embedding.weight)  # type: ignore[union-attr, arg-type]


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_weights(path, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
    with pytest.raises(ExportError, match=r"tensors \['bias'\] that the model does not have"):
        load_champion(path, nn.Linear(2, 2, bias=False))
    with pytest.raises(ExportError, match=r"the model has torch.float32 \[3, 2\]"):
        load_champion(path, nn.Linear(2, 3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        read_tensors(path)


class Observed(nn.Linear):
    """One range for all channels, until there is one for each."""

    def __init__(self, *shape: int) -> None:
        super().__init__(2, 3)
        self.register_buffer("range", torch.zeros(shape))


def test_a_buffer_that_grew_in_training_comes_as_it_was_saved(tmp_path: Path) -> None:
    path, trained = tmp_path / "model.safetensors", Observed(3)
    trained.range = torch.arange(3, dtype=torch.float64)
    write_weights(path, trained.state_dict())
    loaded = load_champion(path, Observed(1))
    assert loaded.range.dtype == torch.float64
    assert torch.equal(loaded.range, trained.range)  # type: ignore[arg-type]
    assert torch.equal(loaded.weight, trained.weight)  # type: ignore[arg-type]
