"""Averages of weight files: exact where they can be, the same in any order, and of one model."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from holdfast.training.averages import averaging
from holdfast.training.averages.averaging import Term, write_average, write_weights
from holdfast.training.checkpointing.tensor_file import parse_tensors
from holdfast.training.errors import CheckpointCorruptError, SelectionError, StorageError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.complex64, torch.int64, torch.bool)
Tensors = dict[str, Tensor]


def random_tensor(dtype: torch.dtype, shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(tuple(shape), generator=generator) < 0.5
    if dtype == torch.int64:
        return torch.randint(-(2**40), 2**40, tuple(shape), generator=generator)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def model(seed: int) -> Tensors:
    tensors = {
        f"layer.{str(dtype).removeprefix('torch.')}": random_tensor(dtype, (7, 5), seed)
        for dtype in DTYPES
    }
    tensors["odd"] = random_tensor(torch.float32, (averaging.CHUNK_ITEMS + 3,), seed)
    return {**tensors, "tied": tensors["odd"], "empty": torch.empty(0, 3)}


def written(folder: Path, models: Sequence[Tensors]) -> list[Path]:
    paths = []
    for number, tensors in enumerate(models):
        path = folder / f"step-{number:08d}.safetensors"
        path.unlink(missing_ok=True)
        write_weights(path, tensors)
        paths.append(path)
    return paths


def averaged(paths: Sequence[Path], weights: Sequence[float] | None = None) -> bytes:
    target = paths[0].parent / "average.safetensors"
    target.unlink(missing_ok=True)
    terms = [Term(p, w) for p, w in zip(paths, weights or [1.0] * len(paths), strict=True)]
    digest = write_average(target, terms)
    content = target.read_bytes()
    assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    return content


def parse(content: bytes) -> Tensors:
    memory = torch.empty(len(content), dtype=torch.uint8)
    memory.numpy().data[:] = content
    return parse_tensors(memory, "average")


def test_five_copies_average_to_the_same_bytes(tmp_path: Path) -> None:
    special = torch.tensor([float("nan"), float("inf"), -0.0, 3e38, 1e-45])
    signalling = torch.tensor([0x7FA00001], dtype=torch.int32).view(torch.float32)
    paths = written(tmp_path, [{**model(0), "special": special, "signalling": signalling}] * 5)
    assert averaged(paths) == paths[0].read_bytes()
    assert averaged(paths, [0.1, 0.7, -0.3, 2.0, 1 / 3]) == paths[0].read_bytes()


def test_one_file_averages_to_itself(tmp_path: Path) -> None:
    (path,) = written(tmp_path, [model(3)])
    assert averaged([path], [0.3]) == path.read_bytes()


def test_all_orders_of_five_give_the_same_bytes(tmp_path: Path) -> None:
    small = [{k: v for k, v in model(seed).items() if k != "odd"} for seed in range(5)]
    paths = written(tmp_path, small)
    weighted = list(zip(paths, [0.5, 0.1, 0.2, 0.7, 0.3], strict=True))
    uniform, other = set(), set()
    for order in itertools.permutations(weighted):
        ordered, weights = [path for path, _ in order], [weight for _, weight in order]
        uniform.add(averaged(ordered))
        other.add(averaged(ordered, weights))
    assert len(uniform) == len(other) == 1
    assert uniform != other


def test_the_average_is_that_of_fp64(tmp_path: Path) -> None:
    models = [model(seed) for seed in range(3)]
    found = parse(averaged(written(tmp_path, models), [1.0, 2.0, 5.0]))
    for name in ("layer.float32", "layer.float16", "layer.bfloat16", "odd"):
        parts = [m[name].double() * w for m, w in zip(models, (1.0, 2.0, 5.0), strict=True)]
        assert torch.equal(found[name], (torch.stack(parts).sum(0) / 8.0).to(found[name].dtype))
    for name in ("layer.int64", "layer.bool"):
        assert torch.equal(found[name], models[-1][name]), name
    assert found["tied"] is found["odd"]


def test_the_newest_is_the_last_by_step_not_by_the_alphabet(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{step:08d}.safetensors" for step in (99999999, 100000000)]
    for number, path in enumerate(paths):
        write_weights(path, {"count": torch.tensor(number)})
    assert parse(averaged(paths))["count"] == 1


def test_others_read_what_is_written(tmp_path: Path) -> None:
    paths = written(tmp_path, [model(seed) for seed in range(2)])
    content = averaged(paths)
    official, own = load_file(tmp_path / "average.safetensors"), parse(content)
    assert all(torch.equal(official[name], own[name]) for name in official)
    assert own.keys() - official.keys() == {"tied"}  # stored once


@st.composite
def families(draw: st.DrawFn) -> list[Tensors]:
    """Members of one model: any types and shapes, some names tied."""
    kinds = draw(
        st.lists(
            st.tuples(
                st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()
            ),
            min_size=1,
            max_size=5,
        )
    )
    seeds = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    members = []
    for seed in seeds:
        tensors = {}
        for number, (dtype, shape, is_tied) in enumerate(kinds):
            tensors[f"{number}"] = random_tensor(dtype, shape, seed + number)
            if is_tied:
                tensors[f"{number}.tied"] = tensors[f"{number}"]
        members.append(tensors)
    return members


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(members=families(), data=st.data())
def test_averages_of_any_types_and_ties(
    tmp_path: Path, members: list[Tensors], data: st.DataObject
) -> None:
    paths = written(tmp_path, members)
    content = averaged(paths)
    assert content == averaged(data.draw(st.permutations(paths)))
    found = parse(content)
    for name, newest in members[-1].items():
        assert found[name].dtype == newest.dtype
        assert found[name].shape == newest.shape
        if name.endswith(".tied") and newest.numel():
            assert found[name] is found[name.removesuffix(".tied")]
        if newest.dtype in (torch.int64, torch.bool):
            assert torch.equal(found[name], newest)
        elif newest.numel() and newest.dtype in FLOATS:
            stacked = torch.stack([member[name] for member in members])
            assert torch.all(found[name] >= stacked.amin(0))
            assert torch.all(found[name] <= stacked.amax(0))


def test_a_moving_average_takes_the_types_and_ties_of_its_model(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}
    track = {"a": torch.tensor([1.0, 1.001, 2.0]), "n": torch.tensor(7)}
    named = {f"gamma-5.0/{name}": tensor for name, tensor in track.items()}
    write_weights(tmp_path / "model", {**weights, "b": weights["a"]})
    write_weights(
        tmp_path / "ema",
        {**named, "gamma-5.0/b": named["gamma-5.0/a"], "other/a": named["gamma-5.0/n"]},
    )
    write_average(tmp_path / "out", [Term(tmp_path / "ema", 1.0, "gamma-5.0/")], tmp_path / "model")
    found = parse((tmp_path / "out").read_bytes())
    assert torch.equal(found["a"], track["a"].to(torch.bfloat16))
    assert found["b"] is found["a"]
    assert found["n"] == 7


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(2), "c": torch.zeros(1)}, r"average b.*step-00000000.*absent"),
        ({"a": torch.zeros(3), "b": torch.zeros(1)}, r"average a.*\[2\].*\[3\]"),
        ({"a": torch.zeros(2).half(), "b": torch.zeros(1)}, r"average a.*float32.*float16"),
    ],
)
def test_weights_of_different_models_are_refused_by_name(
    tmp_path: Path, other: Tensors, message: str
) -> None:
    one = {"a": torch.zeros(2), "b": torch.zeros(1)}
    with pytest.raises(SelectionError, match=message) as refused:
        averaged(written(tmp_path, [other, one]))
    assert all(f"step-0000000{number}" in str(refused.value) for number in (0, 1))


def test_weights_that_are_tied_differently_are_refused_by_name(tmp_path: Path) -> None:
    shared = torch.zeros(2)
    with pytest.raises(SelectionError, match="cannot average b"):
        averaged(written(tmp_path, [{"a": shared, "b": shared}, {"a": shared, "b": shared + 1}]))


def test_nothing_to_average_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="found none"):
        write_average(tmp_path / "out", [])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle", None])
def test_what_is_no_weight_file_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"bad\.safetensors"):
        write_average(tmp_path / "out", [Term(path)])


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    (path,) = written(tmp_path, [model(0)])
    before = path.read_bytes()
    with pytest.raises(StorageError):
        write_average(path, [Term(path)])
    assert path.read_bytes() == before
