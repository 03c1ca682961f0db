"""What is read as weights, from where, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from holdfast.training.errors import DataFormatError, DataNotFoundError, HoldfastError
from holdfast.training.weights.reading import read_torch_file, read_weights
from tests.training.bundles.small_bundle import seal

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1], dtype=torch.int64)}


def assert_same(found: dict[str, Tensor]) -> None:
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_safetensors_are_told_by_their_content(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.bin")
    assert_same(read_weights(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        OrderedDict(WEIGHTS),
        {"model": WEIGHTS, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3},
        {"state_dict": WEIGHTS, "best_loss": torch.tensor(0.5)},
        {"epoch": 1, "model_state_dict": {**WEIGHTS, "_extra_state": {"count": 1}}},
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_torch_files_of_the_usual_kinds(content: object, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    assert_same(read_weights(path))


def test_another_entry_is_taken_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"model": {"a": torch.zeros(1)}, "ema": WEIGHTS}, path)
    assert_same(dict(read_torch_file(path, "ema").weights))
    with pytest.raises(DataFormatError, match=r"no entry 'best'.*takes one of: model, ema"):
        read_torch_file(path, "best")


class Evil:
    def __reduce__(self) -> object:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("content", [nn.Linear(1, 1), {"model": WEIGHTS, "args": Evil()}])
def test_a_file_that_would_run_code_is_refused_and_runs_none(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(DataFormatError, match=r"is code: reading it could run anything") as error:
        read_weights(tmp_path / "old.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 no zip", b"\x80\x02 no pickle", b"hello", b"\x08" + bytes(7) + b"{"],
)
def test_what_is_no_weight_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(HoldfastError) as error:
        read_weights(tmp_path / "file")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "file") in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"layers": 3}}])
def test_a_file_without_tensors_by_name_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(DataFormatError, match=r"tensors by name; it holds"):
        read_weights(tmp_path / "old.pt")


def test_the_weights_of_a_bundle_are_held_to_its_manifest(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    seal(tmp_path)
    assert_same(read_weights(tmp_path))
    save_file({**WEIGHTS, "a": torch.zeros(2, 3)}, file)
    with pytest.raises(DataFormatError, match=r"was changed: the bundle's manifest says"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["", "missing.pt"])
def test_a_place_without_weights_says_what_is_expected(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"gives no weights.*expected a safetensors file"):
        read_weights(tmp_path / name)
