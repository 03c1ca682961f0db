"""A step of several shards: each by itself, summed in one fixed order.

A shard begins with the weights and buffers of the step, and with generators that are seeded from
(seed, step, shard). Its gradient, its loss and the buffers that it leaves are functions of the step
and of its samples alone, so it does not matter which rank computes it. Gradients and floating-point
buffers are summed by ``gradient_tree``; a buffer becomes the mean over the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from holdfast.training.distributed.buffers import Buffers, is_counter
from holdfast.training.distributed.early_rows import EarlyRows
from holdfast.training.distributed.gradient_tree import TreeCounter
from holdfast.training.distributed.row_sums import RowSums, Sum, finished
from holdfast.training.distributed.rows import Memory, Row, by_type, early_groups
from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.summary import Done, Summary
from holdfast.training.distributed.world import World
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.exactness.seeding import seed_shard

if TYPE_CHECKING:  # it takes a moment to import, and few need it
    from holdfast.training.distributed.slice_sums import PassSums
    from holdfast.training.distributed.spreading import Spread


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
    own sum, which is faster. Sums of the last layers' gradients begin during the backward pass
    where that changes no bit.
    """

    def __init__(  # noqa: PLR0913  # the parts of a step, and of those that do it together
        self,
        model: nn.Module,
        world: World,
        seed: int,
        *,
        num_shards: int,
        is_in_tree: bool,
        are_alike: bool = False,
        monitor: AgreedMonitor | None = None,
        spread: Spread | None = None,
    ) -> None:
        """``spread`` sums gradients itself, slice by slice, where weights lie in slices.

        With ``are_alike`` all shards must go through the same parameters, as they must in slices.
        """
        self._model = model
        self._world = world
        self._seed = seed
        self._num_shards = num_shards
        self._row_sums = RowSums(world, is_in_tree=is_in_tree, are_dealt=are_alike)
        self._are_alike = are_alike
        self._monitor = monitor
        self._spread = spread
        self._buffers = Buffers(model)
        self._parameters: dict[str, nn.Parameter] = {}
        self._rows: list[Row] = []
        self._summary = Summary({}, self._buffers, num_shards)
        self._lent: list[tuple[Row, Memory]] = []
        self._early = EarlyRows([], self._begin_early)
        self._begun: list[Sum] = []
        self._done: Done | None = None
        self._last_shard = -1

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
        self._begun = []
        done = self._own_shards(step, [*pieces], backward)
        with torch.no_grad():
            values = self._summary.packed(done, self._has_notice(), self._buffers.changed)
            values = self._sum_all(done, values)
        if self._spread is not None and (
            some := self._summary.used_by_some(values, self._world.size)
        ):
            raise _used_by_some(some)
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
        is_told = self._spread is None or self._are_alike
        named = self._model.named_parameters() if is_told else ()
        trained = {n: p for n, p in named if p.requires_grad}
        if (self._rows or trained) and trained.keys() == self._parameters.keys():
            return
        complex_ = [name for name, p in trained.items() if p.is_complex()]
        if complex_:
            raise ExperimentError(
                f"the parameter {complex_[0]} is complex, and such gradients are not summed over "
                f"shards: train with distributed.strategy=none"
            )
        self._parameters = trained
        summed = trained if self._spread is None else {}
        gradients: dict[str, Tensor] = {f"{GRADIENT}{name}": p for name, p in summed.items()}
        can_overlap = self._world.size > 1 and self._row_sums.can_be_cut()
        early = [*early_groups(gradients)] if can_overlap else []
        for group in early:
            gradients = {n: tensor for n, tensor in gradients.items() if n not in group}
        buffers = {n: b for n, b in self._buffers.now().items() if b.is_floating_point()}
        self._summary = Summary(trained, self._buffers, self._num_shards)
        self._rows = [Row(group, self._world.size, 0) for group in early]
        # In the row of fp32, where there is one, the summary travels along: one exchange less.
        self._rows += [
            Row(group, self._world.size, self._summary.size if dtype == torch.float32 else 0)
            for dtype, group in by_type({**gradients, **buffers}).items()
        ]
        self._early.remove()
        rows = [{n: trained[n.removeprefix(GRADIENT)] for n in group} for group in early]
        self._early = EarlyRows(rows, self._begin_early)

    def _own_shards(self, step: int, pieces: list[P], backward: Callable[[P], Tensor]) -> Done:
        num_shards = pieces[0].num_shards
        counters = [TreeCounter(num_shards, row.add) for row in self._rows]
        done = self._done = Done(num_shards, {}, set(), counters, {})
        own = [piece for piece in pieces if piece.num_samples]
        slices = None if self._spread is None else self._pass_sums(num_shards)
        for shard, group in groupby(own, key=lambda piece: piece.shard):
            if done.losses:
                with torch.no_grad():
                    self._buffers.put_back()
            seed_shard(self._seed, "shard", step, shard)
            parts = [*group]
            losses = [
                self._backward(part, backward, is_last_of_shard=part is parts[-1], own=own)
                for part in parts
            ]
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
            done.losses[shard] = loss
            if self._are_alike:
                self._require_alike(done)
            self._take(shard, done)
            if slices is not None:
                slices.take(shard // self._world.size)
        if slices is not None:
            slices.put()
        return done

    def _require_alike(self, done: Done) -> None:
        """Ranks sum what lies in one place of their slices, whatever parameter that is of."""
        used = {name for name, p in self._parameters.items() if p.grad is not None}
        if len(done.losses) == 1:
            done.used.update(used)
        elif used != done.used:
            raise _used_by_some(used ^ done.used)

    def _pass_sums(self, num_shards: int) -> PassSums:
        from holdfast.training.distributed.slice_sums import PassSums

        return PassSums(self._model.parameters(), num_shards // self._world.size)

    def _backward(
        self, piece: P, backward: Callable[[P], Tensor], *, is_last_of_shard: bool, own: list[P]
    ) -> Tensor:
        if self._spread is not None:
            self._spread.begin_pass(is_last=is_last_of_shard)
            with self._world.lost_ranks_found():
                return backward(piece)
        if piece is not own[-1]:
            return backward(piece)
        self._last_shard = piece.shard
        with self._early.watching():
            return backward(piece)

    @torch.no_grad()
    def _begin_early(self, number: int) -> None:
        """Begin the sum of a row that is complete, in the middle of a backward pass."""
        assert self._done is not None
        self._fill(number, self._last_shard, self._done)
        self._begin(number, self._done)

    def _begin(self, number: int, done: Done, values: Tensor | None = None) -> None:
        row = self._rows[number]
        own = self._row_sums.own(row, done.counters[number])
        if row.has_extra and own and values is not None:
            own[0].extra.copy_(values)
        self._begun.append(self._row_sums.begun(row, own, done.num_shards))

    @torch.no_grad()
    def _take(self, shard: int, done: Done) -> None:
        """Put what a shard has left into rows, and its gradients away."""
        self._buffers.look()
        if shard == 0:
            integers = {name: b for name, b in self._buffers.now().items() if is_counter(b)}
            done.integers.update({name: b.clone() for name, b in integers.items()})
        for number in range(len(self._begun), len(self._rows)):
            self._fill(number, shard, done)

    def _fill(self, number: int, shard: int, done: Done) -> None:
        row, now = self._rows[number], self._buffers.now()
        memory = row.take()
        places, values = [], []
        for name, place in memory.tensors.items():
            own = name.removeprefix(GRADIENT)
            value = now[name] if own == name else self._taken_gradient(own, done)
            if value is None:
                place.zero_()
            else:
                places.append(place)
                values.append(value)
        if places:
            torch._foreach_copy_(places, values)
        done.counters[number].take(shard, memory)

    def _taken_gradient(self, name: str, done: Done) -> Tensor | None:
        """A shard's gradient, put away: the next one's begins anew."""
        gradient = self._gradient(name)
        if gradient is not None:
            done.used.add(name)
            self._parameters[name].grad = None
        return gradient

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
        for number in range(len(self._begun), len(self._rows)):
            self._begin(number, done, values)
        if not any(row.has_extra for row in self._rows):
            values = self._world.sum_of(values)
        totals = finished(self._begun)
        self._lent = [*zip(self._rows, totals, strict=True)]
        for row, total in self._lent:
            if row.has_extra:
                values = total.extra.double().cpu()
        self._put(totals, values, done.num_shards)
        return values

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


def _used_by_some(names: set[str]) -> ExperimentError:
    return ExperimentError(
        f"{min(names)} has a gradient in some shards of a step alone: with "
        f"distributed.strategy=fsdp all shards go through the same parameters; use strategy=ddp"
    )
