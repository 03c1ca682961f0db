"""A step of several shards: each by itself, summed in one fixed order.

A shard begins with the weights and buffers of the step, and with generators that are seeded from
(seed, step, shard). Its gradient, its loss and the buffers that it leaves are functions of the step
and of its samples alone, so it does not matter which rank computes it. Gradients and floating-point
buffers are summed by ``gradient_tree``; a buffer becomes the mean over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from holdfast.training.distributed.buffers import Buffers, is_counter
from holdfast.training.distributed.gradient_tree import (
    TreeCounter,
    nodes_of,
    shards_of_rank,
    tree_sum,
)
from holdfast.training.distributed.rows import Memory, Row
from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.summary import Done, Summary
from holdfast.training.distributed.world import World
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.exactness.seeding import seed_shard


class Piece(Protocol):
    """A microbatch that knows its shard."""

    @property
    def shard(self) -> int:
        """The number of its shard."""
        ...

    @property
    def num_shards(self) -> int:
        """Shards of its step: fewer than configured where there are fewer samples."""
        ...

    @property
    def num_samples(self) -> int:
        """Its samples; 0 for a rank that has no shard of the step."""
        ...


GRADIENT = "gradient of "
P = TypeVar("P", bound=Piece)


class ShardedStep(Generic[P]):
    """Does the shards of steps that are this rank's, and sums with the other ranks.

    ``num_shards`` are the most that a step has. With ``is_in_tree`` the sums are those of one tree
    over the shards, whatever the number of ranks; without, there is one shard a rank, and gloo's
    own sum, which is faster.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        seed: int,
        *,
        num_shards: int,
        is_in_tree: bool,
        monitor: AgreedMonitor | None = None,
    ) -> None:
        self._model = model
        self._world = world
        self._seed = seed
        self._num_shards = num_shards
        self._is_in_tree = is_in_tree or world.size == 1
        self._monitor = monitor
        self._buffers = Buffers(model)
        self._parameters: dict[str, nn.Parameter] = {}
        self._rows: list[Row] = []
        self._summary = Summary({}, self._buffers, num_shards)
        self._lent: list[tuple[Row, Memory]] = []

    def __call__(self, step: int, pieces: Iterable[P], backward: Callable[[P], Tensor]) -> Tensor:
        """Leave the gradients of the whole step in the parameters. Returns its loss.

        Args:
            step: how many steps were done before.
            pieces: this rank's microbatches of the step, shard by shard.
            backward: adds the gradients of one to the parameters, and returns its part of the
                step's loss.

        Raises:
            RankLostError: another rank has ended or hangs.
        """
        self._world.beat()
        self._lay_out()
        self._buffers.begin()
        done = self._own_shards(step, pieces, backward)
        with torch.no_grad():
            values = self._summary.packed(done, self._has_notice(), self._buffers.changed)
            values = self._sum_all(done, values)
        seed_shard(self._seed, "after step", step)
        self._world.beat()
        if self._monitor is not None and self._summary.has_notice(values):
            self._monitor.agree()
        return self._summary.loss(values, done)

    def _has_notice(self) -> bool:
        return self._monitor is not None and self._monitor.has_own()

    def _lay_out(self) -> None:
        """Rows for what is trained now: layers may be frozen and unfrozen on the way."""
        for row, lent in self._lent:
            row.give_back(lent)
        self._lent = []
        trained = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        if self._rows and trained.keys() == self._parameters.keys():
            return
        complex_ = [name for name, p in trained.items() if p.is_complex()]
        if complex_:
            raise ExperimentError(
                f"the parameter {complex_[0]} is complex, and such gradients are not summed over "
                f"shards: train with distributed.strategy=none"
            )
        self._parameters = trained
        buffers = self._buffers.now()
        tensors: dict[str, Tensor] = {f"{GRADIENT}{name}": p for name, p in trained.items()}
        tensors |= {name: b for name, b in buffers.items() if b.is_floating_point()}
        by_type: dict[torch.dtype, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            by_type.setdefault(tensor.dtype, {})[name] = tensor
        self._summary = Summary(trained, self._buffers, self._num_shards)
        # In the row of fp32, where there is one, the summary travels along: one exchange less.
        self._rows = [
            Row(group, self._world.size, self._summary.size if dtype == torch.float32 else 0)
            for dtype, group in by_type.items()
        ]

    def _own_shards(self, step: int, pieces: Iterable[P], backward: Callable[[P], Tensor]) -> Done:
        done: Done | None = None
        for shard, group in groupby(pieces, key=lambda piece: piece.shard):
            microbatches = iter(group)
            first = next(microbatches)
            if done is None:
                counters = [TreeCounter(first.num_shards, row.add) for row in self._rows]
                done = Done(first.num_shards, {}, set(), counters, {})
            elif first.num_samples:
                with torch.no_grad():
                    self._buffers.put_back()
            if first.num_samples:
                seed_shard(self._seed, "shard", step, shard)
                losses = [backward(microbatch) for microbatch in (first, *microbatches)]
                loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
                done.losses[shard] = loss
                self._take(shard, done)
        assert done is not None, "a step without a microbatch"
        return done

    @torch.no_grad()
    def _take(self, shard: int, done: Done) -> None:
        """Put what a shard has left into rows, and its gradients away."""
        self._buffers.look()
        now = self._buffers.now()
        if shard == 0:
            integers = {name: b for name, b in now.items() if is_counter(b)}
            done.integers.update({name: b.clone() for name, b in integers.items()})
        gradients = {name: self._gradient(name) for name in self._parameters}
        done.used.update(name for name, gradient in gradients.items() if gradient is not None)
        found = {f"{GRADIENT}{name}": gradient for name, gradient in gradients.items()}
        for row, counter in zip(self._rows, done.counters, strict=True):
            memory = row.take()
            pairs = [(place, now.get(n, found.get(n))) for n, place in memory.tensors.items()]
            for place, value in pairs:
                if value is None:
                    place.zero_()
            written = [(place, value) for place, value in pairs if value is not None]
            torch._foreach_copy_([place for place, _ in written], [value for _, value in written])
            counter.take(shard, memory)
        for parameter in self._parameters.values():
            parameter.grad = None

    def _gradient(self, name: str) -> Tensor | None:
        gradient = self._parameters[name].grad
        if gradient is not None and gradient.layout != torch.strided:
            raise ConfigError(
                f"the gradient of {name} is sparse, and such ones are not summed over shards: "
                f"build the layer with sparse=False, or train with distributed.strategy=none"
            )
        return gradient

    def _sum_all(self, done: Done, values: Tensor) -> Tensor:
        """Put the sums over all shards into the model. Returns the summary of all ranks."""
        along = next((k for k, row in enumerate(self._rows) if row.dtype == torch.float32), None)
        if along is None:
            values = self._world.sum_of(values)
        sums = []
        for number, (row, counter) in enumerate(zip(self._rows, done.counters, strict=True)):
            own = [*counter.parts().values()]
            if not own and not self._is_in_tree:
                own = [row.take()]
                own[0].flat.zero_()
            if number == along and own:
                own[0].extra.copy_(values)
            total = self._sum(row, own, done.num_shards)
            self._lent.append((row, total))
            if number == along:
                values = total.extra.double()
            sums.append(total)
        self._put(sums, values, done.num_shards)
        return values

    def _sum(self, row: Row, own: list[Memory], num_shards: int) -> Memory:
        """The sum of a row over all shards, of all ranks."""
        if self._world.size == 1:
            return own[0]
        if not self._is_in_tree:
            self._world.sum_of(own[0].flat)
            return own[0]
        total = row.take()
        slice_ = self._slice(row, [part.flat for part in own], num_shards)
        self._world.joined_slices(slice_, total.flat)
        for part in own:
            row.give_back(part)
        return total

    def _slice(self, row: Row, own: list[Tensor], num_shards: int) -> Tensor:
        """This rank's slice of the sum: it gets that of all partial sums, and adds them up."""
        size, width = self._world.size, row.size // self._world.size
        if len(own) == 1:
            flat = own[0]
        elif own:
            flat = torch.stack(own).view(len(own), size, width).transpose(0, 1).reshape(-1)
        else:
            flat = torch.empty(0, dtype=row.dtype)
        nodes = [nodes_of(shards_of_rank(num_shards, k, size), num_shards) for k in range(size)]
        lengths = [len(of_rank) * width for of_rank in nodes]
        taken = self._world.exchanged(flat, [len(own) * width] * size, lengths)
        every = [node for of_rank in nodes for node in of_rank]
        parts = dict(zip(every, taken.view(len(every), width).unbind(), strict=True))
        return tree_sum(parts, num_shards, lambda left, right: left.add_(right))

    def _put(self, sums: list[Memory], values: Tensor, num_shards: int) -> None:
        """Gradients and buffers of the whole step into the model."""
        used, changed = self._summary.used(values), self._summary.changed(values)
        now = self._buffers.now()
        for total in sums:
            for name, place in total.tensors.items():
                own = name.removeprefix(GRADIENT)
                if own != name:
                    self._parameters[own].grad = place if own in used else None
                elif name in changed:
                    now[name].copy_(place / num_shards)
        for name, integers in self._summary.integers(values).items():
            if name in changed:
                now[name].copy_(integers.view(now[name].shape))
