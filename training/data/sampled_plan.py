"""Batches in the order that a sampler of torch's draws, as functions of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from holdfast.training.data.permutation import Int64Array
from holdfast.training.errors import InputError
from holdfast.training.exactness.seeding import IsolatedGenerators, derive_seed

NUM_EPOCHS_HELD = 2  # one is trained, the next one is prefetched


class SampledPlan:
    """The batches of a batch sampler, which is iterated once for each epoch.

    Meanwhile every generator that it may draw from is seeded from (seed, epoch): the global ones,
    and its own or its sampler's ``generator``, which is put back. ``set_epoch`` is called where
    there is one. Memory is that of an epoch's indices. Raises InputError where it gives other
    batches when it is asked again, or none.
    """

    def __init__(self, batch_sampler: Iterable[list[int]], seed: int) -> None:
        self._batch_sampler, self._seed = batch_sampler, seed
        self._generators = IsolatedGenerators()
        self._epochs: dict[int, list[Int64Array]] = {}
        first = self._batches(0)
        self._epochs.clear()
        again = self._batches(0)
        kind = type(batch_sampler).__name__
        if not first:
            raise InputError(f"{kind} gives no batch; expected at least one in each epoch")
        if len(first) != len(again) or not all(map(np.array_equal, first, again)):
            raise InputError(
                f"{kind} gives other batches when its epoch is drawn again: let it draw from "
                f"torch, NumPy, random or its own generator, and keep no place of its own"
            )

    def num_steps(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._batches(epoch))

    def indices(self, epoch: int, step_in_epoch: int) -> Int64Array:
        """Indices of the samples of a batch. Raises IndexError outside of the epoch."""
        return self._batches(epoch)[step_in_epoch]

    def _batches(self, epoch: int) -> list[Int64Array]:
        if epoch not in self._epochs:
            while len(self._epochs) >= NUM_EPOCHS_HELD:
                del self._epochs[min(self._epochs)]
            seed = derive_seed(self._seed, "order", epoch)
            self._epochs[epoch] = self._generators.run(seed, self._drawn, epoch)
        return self._epochs[epoch]

    def _drawn(self, epoch: int) -> list[Int64Array]:
        parts = (self._batch_sampler, getattr(self._batch_sampler, "sampler", None))
        for part in parts:
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
        found = (getattr(part, "generator", None) for part in parts)
        own = [generator for generator in found if isinstance(generator, torch.Generator)]
        states = [generator.get_state() for generator in own]
        for generator in own:
            generator.manual_seed(derive_seed(self._seed, "own order", epoch))
        try:
            return [np.asarray(batch, dtype=np.int64) for batch in self._batch_sampler]
        finally:
            for generator, state in zip(own, states, strict=True):
                generator.set_state(state)
