"""Weights in slices: the same bits after a restore, whole checkpoints, real ranks of gloo."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

from holdfast.training.averages.ema import MovingAverages
from holdfast.training.checkpointing.model_weights import load_model
from holdfast.training.configuration.schema import EmaConfig
from holdfast.training.distributed.gradient_tree import shards_of_rank
from holdfast.training.distributed.row_norm import RowNorm, squares_of_rows
from holdfast.training.distributed.sharded_step import ShardedStep
from holdfast.training.distributed.spreading import Spread, parts_of
from holdfast.training.distributed.world import World
from holdfast.training.errors import ExperimentError, UnsupportedStateError
from holdfast.training.optimizers.optimizer_state import (
    CapturedOptimizer,
    capture_optimizer,
    restore_optimizer,
)
from tests.training.distributed.test_sharded_step import Piece, in_ranks

NUM_RANKS = 3


class Block(nn.Module):
    """A residual block with batch norm and dropout; 7 rows are not to be cut evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm1d(7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(torch.relu(self.inner(self.norm(x))), 0.2)


class Network(nn.Module):
    """Two blocks between layers whose weights are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 7), nn.Linear(7, 5)
        self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Collective. The whole tensors."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def trained(world: World, folder: Path, first: int, last: int) -> list[str]:
    """Train from a step to another, in slices; what is there at the end as a checkpoint has it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Network().train()
    spread = Spread(model, world)
    averages = MovingAverages(model, EmaConfig(decays=(0.9,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    saved = folder / f"step-{first}"
    if first:
        files = {path.stem: load_file(path) for path in sorted(saved.glob("*.safetensors"))}
        files = spread.sliced(files)
        load_model(model, files["model"])
        values = json.loads((saved / "values.json").read_text())
        restore_optimizer(optimizer, model, CapturedOptimizer(files["optimizer"], values))
        averages.restore(files["ema"], averages.state())
    step = ShardedStep[Piece](
        model, world, 7, num_shards=world.size, is_in_tree=False, spread=spread
    )
    for number in range(first, last):
        draws = torch.Generator().manual_seed(number)
        tokens, classes = torch.randint(5, (2, world.size, 2, 6), generator=draws)
        pieces = [
            Piece(world.rank, world.size, 6, tokens[world.rank, k], classes[world.rank, k])
            for k in range(2)
        ]

        def backward(piece: Piece) -> Tensor:
            loss = cross_entropy(model(piece.samples), piece.classes) / (2 * world.size)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer.zero_grad(set_to_none=True)
        step(number, pieces, backward)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        averages.update(model, number + 1)
    captured = capture_optimizer(optimizer, model)
    tensors = {
        "model": dict(model.state_dict()),
        "optimizer": captured.tensors,
        "ema": averages.tensors(),
    }
    whole = {stem: joined(inner) for stem, inner in tensors.items()}
    target = folder / f"step-{last}"
    if world.rank == 0:
        target.mkdir(exist_ok=True)
        for stem, inner in whole.items():
            own = {name: tensor.clone().contiguous() for name, tensor in inner.items()}
            save_file(own, target / f"{stem}.safetensors")
        (target / "values.json").write_text(json.dumps(captured.values))
    digest = hashlib.sha256()
    for inner in whole.values():
        for name in sorted(inner):
            assert type(inner[name]) in (Tensor, nn.Parameter), name
            digest.update(inner[name].detach().contiguous().view(-1).view(torch.uint8).numpy())
    return [digest.hexdigest()]


@pytest.mark.slow
def test_a_restore_in_new_processes_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    for name in ("calm", "cut", "cut/first", "cut/second"):
        (tmp_path / name).mkdir()
    calm = in_ranks(tmp_path / "calm", NUM_RANKS, lambda world: trained(world, tmp_path, 0, 6))
    assert calm[0] == calm[1] == calm[2]
    in_ranks(tmp_path / "cut/first", NUM_RANKS, lambda world: trained(world, tmp_path, 0, 3))
    cut = in_ranks(tmp_path / "cut/second", NUM_RANKS, lambda world: trained(world, tmp_path, 3, 6))
    assert cut == calm
    weights = load_file(tmp_path / "step-6" / "model.safetensors")
    Network().load_state_dict(weights)  # a process alone reads it


def bits_after_steps(world: World, num_shards: int) -> list[str]:
    """Train with shards, in slices where there are several ranks; weights, norms and losses."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Network().train()
    spread = Spread(model, world, is_in_tree=True) if world.size > 1 else None
    norm = RowNorm(world, spread)
    averages = MovingAverages(model, EmaConfig(decays=(0.9,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = ShardedStep[Piece](
        model, world, 7, num_shards=num_shards, is_in_tree=True, are_alike=True, spread=spread
    )
    digest = hashlib.sha256()
    for number in range(4):
        draws = torch.Generator().manual_seed(number)
        tokens, classes = torch.randint(5, (2, num_shards, 2, 6), generator=draws)
        own = shards_of_rank(num_shards, world.rank, world.size, are_dealt=True)
        pieces = [
            Piece(shard, num_shards, 6, tokens[shard, k], classes[shard, k])
            for shard in own
            for k in range(2)
        ]

        def backward(piece: Piece) -> Tensor:
            loss = cross_entropy(model(piece.samples), piece.classes) / (2 * num_shards)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        optimizer.zero_grad(set_to_none=True)
        loss = step(number, pieces, backward)
        found = norm.clip(model.parameters(), 0.1)
        optimizer.step()
        averages.update(model, number + 1)
        for tensor in (loss, found):
            digest.update(tensor.double().numpy())
    optimizers = capture_optimizer(optimizer, model).tensors
    for inner in (model.state_dict(), optimizers, averages.tensors()):
        for tensor in joined(inner).values():
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy())
    return [digest.hexdigest()]


@pytest.mark.parametrize(
    ("num_shards", "sizes"),
    [
        (4, (4,)),
        pytest.param(4, (2,), marks=pytest.mark.slow),
        pytest.param(6, (2,), marks=pytest.mark.slow),
    ],
)
def test_with_shards_the_bits_are_those_of_one_process_with_all_weights(
    tmp_path: Path, num_shards: int, sizes: tuple[int, ...]
) -> None:
    alone = in_ranks(tmp_path, 1, lambda world: bits_after_steps(world, num_shards))
    for size in sizes:
        assert in_ranks(tmp_path, size, lambda world: bits_after_steps(world, num_shards)) == (
            alone * size
        )


@pytest.mark.parametrize("num_threads", [1, 2])
def test_the_squares_of_a_row_are_its_own_matter(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for shape in ((1, 40000), (7, 5), (64, 3000), (33,), (5, 2, 3)):
            tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            whole = squares_of_rows(tensor)
            for first, last in ((0, 1), (0, 3), (1, 5), (6, 64)):
                part = tensor[first:last]
                if len(part):
                    assert torch.equal(squares_of_rows(part), whole[first:last])
    finally:
        torch.set_num_threads(before)


def spread_by_hand(world: World) -> list[str]:
    """What an experiment's own choice of parts, and an optimizer of other shapes, lead to."""
    torch.manual_seed(0)
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
        fully_shard(model.blocks[0], mesh=mesh)

    spread = Spread(model, world, parallelize)
    whole = joined(model.state_dict())
    assert all(torch.equal(whole[name], tensor) for name, tensor in before.items())
    found = [str(isinstance(block, FSDPModule)) for block in (*model.blocks, model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.state[model.embedding.weight]["row"] = model.embedding.weight.detach().sum(1)
    try:
        spread.part("optimizer", capture_optimizer(optimizer, model).tensors)
    except UnsupportedStateError as error:
        found.append(str(error))
    return [*found, other_routes(world), *unlike_one_process(world)]


class Forked(nn.Module):
    """Two layers of one shape, of which a sample takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, is_one: bool) -> Tensor:
        return (self.one if is_one else self.other)(x)


def other_routes(world: World) -> str:
    """What comes of shards that have gradients of different parameters, of the same shapes."""
    model = Forked()
    spread = Spread(model, world, is_in_tree=True) if world.size > 1 else None
    step = ShardedStep[Piece](
        model, world, 7, num_shards=2, is_in_tree=True, are_alike=True, spread=spread
    )

    def backward(piece: Piece) -> Tensor:
        loss = model(torch.ones(2, 4), is_one=piece.shard == 0).sum()
        loss.backward()
        return loss.detach()

    own = shards_of_rank(2, world.rank, world.size, are_dealt=True)
    with pytest.raises(ExperimentError) as caught:
        step(0, [Piece(shard, 2, 2) for shard in own], backward)
    return str(caught.value)


def unlike_one_process(world: World) -> list[str]:
    """What comes of parts that compute in a type of their own, or are cut into columns."""
    found = []
    for options in (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        {"shard_placement_fn": lambda parameter: Shard(parameter.dim() - 1)},
    ):

        def parallelize(model: nn.Module, mesh: DeviceMesh, options: Any = options) -> None:
            fully_shard(model.one, mesh=mesh, **options)

        with pytest.raises(ExperimentError) as caught:
            Spread(Forked(), world, parallelize, is_in_tree=True)
        found.append(str(caught.value))
    return found


def test_an_experiment_chooses_parts_and_odd_optimizers_are_refused(tmp_path: Path) -> None:
    found = in_ranks(tmp_path, 2, spread_by_hand)
    assert found[0][:3] == ["True", "False", "True"]
    assert "optimizer.embedding.weight/row lies in slices" in found[0][3]
    for routes in (found[0][4], found[1][4], other_routes(World.alone())):
        assert routes.startswith("one.bias has a gradient in some shards of a step alone")
    assert "parallelize() casts by a MixedPrecisionPolicy" in found[1][5]
    assert "parallelize() cuts otherwise than into rows" in found[1][6]


def test_parts_are_the_elements_of_the_outermost_lists_that_share_nothing() -> None:
    network = Network()
    assert [*parts_of(network)] == [*network.blocks]
    network.blocks[1].inner.weight = network.blocks[0].inner.weight
    assert [*parts_of(network)] == []
    assert [*parts_of(nn.Sequential(nn.Linear(2, 2)))] == []


@pytest.mark.parametrize(
    ("parameter", "told"),
    [
        (torch.tensor(1.0), "is a single number"),
        (torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), "is not contiguous"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(parameter: Tensor, told: str) -> None:
    model = nn.ParameterDict({"odd": nn.Parameter(parameter)})
    with pytest.raises(ExperimentError, match=f"fsdp cannot cut odd, which {told}"):
        Spread(model, World.alone())
