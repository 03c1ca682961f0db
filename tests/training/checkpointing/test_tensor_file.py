from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from holdfast.training.checkpointing.snapshot import SnapshotBuffers
from holdfast.training.checkpointing.tensor_file import (
    ALIGNMENT_BYTES,
    DTYPES,
    parse_tensors,
    plan_layout,
)
from holdfast.training.errors import CheckpointCorruptError, UnsupportedStateError
from tests.training.far_memory import Far


def file_bytes(tensors: dict[str, Tensor]) -> bytes:
    return b"".join(SnapshotBuffers().take({"x": tensors})["x.safetensors"].parts)


def in_memory(content: bytes) -> Tensor:
    memory = torch.empty(len(content), dtype=torch.uint8)
    memory.numpy().data[:] = content
    return memory


def parse(content: bytes) -> dict[str, Tensor]:
    parsed = parse_tensors(in_memory(content), "x.safetensors")
    far = parse_tensors(in_memory(content).as_subclass(Far), "x.safetensors")
    assert {n: as_bytes(t.cpu()) for n, t in far.items()} == {
        n: as_bytes(t) for n, t in parsed.items()
    }
    return parsed


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.builds(
        random_tensor,
        st.sampled_from(list(DTYPES.values())),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.integers(0, 1000),
    ),
    max_size=8,
)


@given(TENSORS)
def test_every_type_and_shape_comes_back_bit_by_bit(tensors: dict[str, Tensor]) -> None:
    content = file_bytes(tensors)
    found, official = parse(content), safetensors.torch.load(content)
    assert found.keys() == official.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for other in (found[name], official[name]):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert as_bytes(other) == as_bytes(tensor)


@given(TENSORS)
def test_the_order_in_which_tensors_come_does_not_change_the_bytes(
    tensors: dict[str, Tensor],
) -> None:
    backwards = dict(reversed(tensors.items()))
    assert file_bytes(tensors) == file_bytes(backwards)


def test_the_official_library_reads_the_file_and_we_read_its(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4).bfloat16(), "a": torch.arange(5), "flag": torch.tensor(True)}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    ours.write_bytes(file_bytes(tensors))
    safetensors.torch.save_file(tensors, theirs)
    for found in (safetensors.torch.load_file(ours), parse(theirs.read_bytes())):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_tied_tensors_are_stored_once_and_come_back_tied() -> None:
    weight = torch.randn(100, 10)
    content = file_bytes({"head.weight": weight, "embedding.weight": weight, "other": weight[0]})
    assert len(content) < 2 * weight.numel() * 4
    found = parse(content)
    assert found["head.weight"] is found["embedding.weight"]
    assert torch.equal(found["head.weight"], weight)
    assert torch.equal(found["other"], weight[0])
    assert found["other"].data_ptr() != found["head.weight"].data_ptr()


def test_equal_but_separate_tensors_stay_separate() -> None:
    found = parse(file_bytes({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.empty(0)}))
    found["a"] += 1
    assert found["b"].sum() == 0


def test_transposed_strided_and_expanded_tensors_are_stored_as_they_look() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.t(), "s": base[:, ::2], "e": base[:1].expand(3, 6)}
    tensors["channels_last"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = parse(file_bytes(tensors))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_parameter_with_a_gradient_is_stored_without_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not parse(file_bytes({"p": parameter}))["p"].requires_grad


def test_a_generator_takes_its_state_from_what_was_read() -> None:
    # Generator.set_state reads a storage from its start, whatever the offset of the tensor.
    state = torch.Generator().manual_seed(5).get_state()
    found = parse(file_bytes({"a": torch.zeros(3, dtype=torch.uint8), "state": state}))
    generator = torch.Generator()
    generator.set_state(found["state"])
    assert torch.equal(generator.get_state(), state)


def test_tensors_lie_at_multiples_of_64_bytes_where_their_sizes_allow() -> None:
    tensors = {"counter": torch.tensor(7), "weight": torch.randn(16), "bias": torch.randn(48)}
    header = plan_layout(tensors, "model").header()
    slots = plan_layout(tensors, "model").slots
    assert len(header) % ALIGNMENT_BYTES == 0
    assert list(slots) == ["bias", "weight", "counter"]
    assert all(slot.start % ALIGNMENT_BYTES == 0 for slot in slots.values())


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.empty(3, device="meta"), "on meta"),
        (torch.zeros(3, dtype=torch.complex128), "torch.complex128"),
        ({1, 2}, "a set"),
        (3.0, "a float"),
    ],
)
def test_what_the_format_lacks_is_refused_by_its_path(tensor: Tensor, problem: str) -> None:
    with pytest.raises(UnsupportedStateError, match=rf"^optimizer\.foo\.bar is .*{problem}"):
        SnapshotBuffers().take({"optimizer": {"foo.bar": tensor}})


def encoded(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",
        b"\x80\x04\x95\x10\x00\x00\x00\x00" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        encoded([1]),
        encoded("x"),
        encoded({"a": ENTRY}, bytes(7)),
        encoded({"a": ENTRY}, bytes(9)),
        encoded({"a": ENTRY, "b": ENTRY}, bytes(8)),
        encoded({"a": {**ENTRY, "dtype": "object"}}, bytes(8)),
        encoded({"a": {**ENTRY, "shape": [-2]}}, bytes(8)),
        encoded({"a": {**ENTRY, "shape": [1.5]}}, bytes(8)),
        encoded({"a": {**ENTRY, "shape": [3]}}, bytes(8)),
        encoded({"a": {"dtype": "F32"}}, bytes(8)),
        encoded({"a": 5}, bytes(8)),
        encoded({"__metadata__": {"aliases": '{"b": "gone"}'}, "a": ENTRY}, bytes(8)),
        encoded({"__metadata__": {"aliases": "["}, "a": ENTRY}, bytes(8)),
        b"\x02\0\0\0\0\0\0\0\xff\xff",
    ],
)
@pytest.mark.parametrize("kind", [Tensor, Far])
def test_what_is_not_a_safetensors_file_is_refused_by_name(
    content: bytes, kind: type[Tensor]
) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"x\.safetensors is not a safetensors file"):
        parse_tensors(in_memory(content).as_subclass(kind), "x.safetensors")
