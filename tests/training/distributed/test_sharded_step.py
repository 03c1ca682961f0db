"""Steps of several shards: the same bits for any number of ranks, in real processes of gloo."""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.nn.functional import cross_entropy

from holdfast.training.distributed import rows
from holdfast.training.distributed.gradient_tree import shards_of_rank
from holdfast.training.distributed.sharded_step import ShardedStep
from holdfast.training.distributed.world import World
from holdfast.training.errors import ConfigError, ExperimentError

NUM_STEPS, SHORT_STEP, SHARD_SIZE = 5, 2, 5


@dataclass
class Piece:
    shard: int
    num_shards: int
    num_samples: int
    samples: Tensor | None = None
    classes: Tensor | None = None


class Network(nn.Module):
    """Tied weights, batch norm, dropout, a layer that some shards do not use, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Linear(8, 33), nn.BatchNorm1d(33)
        self.inner = nn.Linear(33, 33)
        self.again = self.inner
        self.seldom, self.frozen = nn.Linear(33, 33), nn.Linear(33, 33).requires_grad_(False)
        self.register_buffer("mask", torch.full((4,), float("-inf")))
        self.head = nn.Linear(33, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.encoder(x)))
        y = nn.functional.dropout(self.again(torch.relu(self.inner(y))), 0.3)
        if x[0, 0] > 1:
            y = y + self.seldom(y)
        return self.head(y + self.frozen(y))


def bits_after_each_step(world: World, num_shards: int, *, is_in_tree: bool) -> list[str]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Network().train()
    step = ShardedStep[Piece](model, world, 7, num_shards=num_shards, is_in_tree=is_in_tree)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for number in range(NUM_STEPS):
        # One step has fewer samples, and so fewer shards than there may be ranks.
        of_step = min(2, num_shards) if number == SHORT_STEP else num_shards
        draws = torch.Generator().manual_seed(number)
        samples = torch.randn(of_step, SHARD_SIZE, 8, generator=draws)
        classes = torch.randint(3, (of_step, SHARD_SIZE), generator=draws)
        pieces = [
            Piece(shard, of_step, SHARD_SIZE, samples[shard], classes[shard])
            for shard in shards_of_rank(of_step, world.rank, world.size)
        ]

        def backward(piece: Piece, of_step: int = of_step) -> Tensor:
            assert piece.samples is not None
            loss = cross_entropy(model(piece.samples), piece.classes) / of_step
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer.zero_grad(set_to_none=True)
        loss = step(number, pieces or [Piece(-1, of_step, 0)], backward)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
        for tensor in (*model.state_dict().values(), loss):
            digest.update(tensor.detach().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def in_ranks(folder: Path, size: int, work: Callable[[World], list[str]]) -> list[list[str]]:
    """What ``work`` gives in each of several processes, by rank."""
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                store = FileStore(str(folder / f"store-{size}"), size)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
                found = work(World(rank, size, store))
                (folder / f"{size}-{rank}.json").write_text(json.dumps(found))
            except BaseException:  # noqa: BLE001  # a process of its own
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * size
    found = [(folder / f"{size}-{rank}.json").read_text() for rank in range(size)]
    return [json.loads(text) for text in found]


@pytest.mark.parametrize(
    ("num_shards", "sizes"),
    [
        (4, (2, 3)),
        pytest.param(2, (2,), marks=pytest.mark.slow),
        pytest.param(7, (2, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_bits_do_not_depend_on_the_number_of_ranks_nor_on_when_sums_begin(
    tmp_path: Path, num_shards: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = in_ranks(
        tmp_path, 1, lambda world: bits_after_each_step(world, num_shards, is_in_tree=True)
    )
    monkeypatch.setattr(rows, "EARLY_BYTES", 2000)
    for size in sizes:
        found = in_ranks(
            tmp_path, size, lambda world: bits_after_each_step(world, num_shards, is_in_tree=True)
        )
        assert found == alone * size


@pytest.mark.slow
def test_two_without_a_tree_have_the_same_bits_whenever_sums_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, early = (tmp_path / name for name in ("late", "early"))
    found = []
    for folder, num_bytes in ((late, rows.EARLY_BYTES), (early, 1)):
        folder.mkdir()
        monkeypatch.setattr(rows, "EARLY_BYTES", num_bytes)
        found.append(
            in_ranks(folder, 2, lambda world: bits_after_each_step(world, 2, is_in_tree=False))
        )
    assert found[0] == found[1]


@pytest.mark.slow
def test_without_a_tree_all_ranks_agree_and_repeat_themselves(tmp_path: Path) -> None:
    once, again = (
        in_ranks(folder, 3, lambda world: bits_after_each_step(world, 3, is_in_tree=False))
        for folder in (tmp_path / "a", tmp_path / "b")
        if folder.mkdir() is None
    )
    assert once == again
    assert once[0] == once[1] == once[2]


class Odd(nn.Module):
    """A model whose buffers or gradients cannot be summed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Embedding(5, 3, sparse=kind == "sparse")
        self.register_buffer("queue", torch.zeros(100, dtype=torch.int64))
        self.register_buffer("range", torch.zeros(3))

    def forward(self) -> Tensor:
        if self.kind == "integers":
            self.queue += 1
        if self.kind == "shape":
            self.range = torch.zeros(4)
        if self.kind == "type":
            self.range = torch.zeros(3, dtype=torch.float64)
        return self.layer(torch.tensor([1, 2])).sum()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("integers", "the buffer queue of integers has changed"),
        ("shape", "the buffer range has taken another shape"),
        ("type", "the buffer range has become torch.float64"),
        ("sparse", "the gradient of layer.weight is sparse"),
    ],
)
def test_what_has_no_sum_is_refused_by_name(kind: str, told: str) -> None:
    model = Odd(kind)
    step = ShardedStep[Piece](model, World.alone(), 0, num_shards=2, is_in_tree=True)

    def backward(_: Piece) -> Tensor:
        loss = model()
        loss.backward()
        return loss.detach()

    with pytest.raises((ExperimentError, ConfigError), match=told):
        step(0, [Piece(0, 2, 1), Piece(1, 2, 1)], backward)


def test_a_complex_parameter_is_refused_by_name() -> None:
    model = nn.ParameterDict({"phase": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    step = ShardedStep[Piece](model, World.alone(), 0, num_shards=2, is_in_tree=True)
    with pytest.raises(ExperimentError, match="phase is complex"):
        step(0, [Piece(0, 1, 1)], lambda _: torch.zeros(()))
