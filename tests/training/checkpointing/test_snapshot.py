from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from holdfast.training.checkpointing.snapshot import SnapshotBuffers, json_image
from holdfast.training.errors import UnsupportedStateError


def test_a_snapshot_does_not_follow_later_changes() -> None:
    live = torch.zeros(100)
    images = SnapshotBuffers().take({"model": {"w": live}})
    before = b"".join(images["model.safetensors"].parts)
    live += 1
    assert b"".join(images["model.safetensors"].parts) == before


def test_buffers_are_used_again() -> None:
    buffers = SnapshotBuffers()
    first = buffers.take({"model": {"w": torch.zeros(1000)}})["model.safetensors"].parts[1]
    second = buffers.take({"model": {"w": torch.ones(1000)}})["model.safetensors"].parts[1]
    assert bytes(first) == bytes(second) == torch.ones(1000).numpy().tobytes()


def test_state_may_grow_and_shrink_between_snapshots() -> None:
    buffers = SnapshotBuffers()
    for num in (10, 1000, 3, 0):
        image = buffers.take({"optimizer": {"m": torch.full((num,), 2.0)}})["optimizer.safetensors"]
        assert image.size_bytes == sum(len(part) for part in image.parts)
        assert bytes(image.parts[1]) == torch.full((num,), 2.0).numpy().tobytes()


def test_nothing_is_copied_if_something_is_refused() -> None:
    buffers = SnapshotBuffers()
    image = buffers.take({"model": {"w": torch.zeros(4)}})["model.safetensors"]
    with pytest.raises(UnsupportedStateError):
        buffers.take({"model": {"w": torch.ones(4)}, "optimizer": {"m": "text"}})  # type: ignore[dict-item]
    assert bytes(image.parts[1]) == bytes(16)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"optimizer": {"foo": {"bar": {1}}}}, r"state\.optimizer\.foo\.bar is a set"),
        ({"history": [1, {"x": (1, 2)}]}, r"state\.history\[1\]\.x is a tuple"),
        ({"a": {3: 1}}, r"state\.a has the key 3"),
        ({"a": math.nan}, r"state\.a is nan"),
        ({"a": -math.inf}, r"state\.a is -inf"),
        ({"a": np.float64(1.0)}, r"state\.a is a numpy\.float64"),
        ({"a": b"x"}, r"state\.a is a bytes"),
    ],
)
def test_what_json_would_lose_is_refused_by_its_path(value: object, message: str) -> None:
    with pytest.raises(UnsupportedStateError, match=message):
        json_image(value, "state")  # type: ignore[arg-type]


def test_json_is_deterministic() -> None:
    one, other = json_image({"b": 1, "a": [1.5]}, "s"), json_image({"a": [1.5], "b": 1}, "s")
    assert one.parts == other.parts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_snapshot_of_a_gpu_is_pinned_and_right() -> None:
    buffers = SnapshotBuffers()
    live = torch.randn(1000, 1000, device="cuda")
    expected = live.cpu().numpy().tobytes()
    parts = buffers.take({"model": {"w": live, "n": torch.tensor(3)}})["model.safetensors"].parts
    live.zero_()
    assert bytes(parts[1]) == expected
    assert torch.frombuffer(parts[1], dtype=torch.uint8).is_pinned()
