"""Batches for a script's own loop, in the place of torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler

from holdfast.training.data.loader import BatchPlan, FixedSizePlan, Loader, Microbatch, WorkerInit
from holdfast.training.data.own_order import own_permutation
from holdfast.training.data.sampled_plan import SampledPlan
from holdfast.training.errors import InputError, kind_of
from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.own_loop import arguments
from holdfast.training.replicas.copies import Copies

Collate = Callable[[list[Any]], Any]
TAKEN = (
    "batch_size, drop_last, num_workers, prefetch_factor, collate_fn, worker_init_fn, pin_memory"
)
ORDER = "the order comes from (seed, epoch), shuffled; leave it out"
PLAIN = (bool, int, float, str)
WHY_NOT = {
    "shuffle": ORDER,
    "sampler": ORDER,
    "batch_sampler": ORDER,
    "generator": ORDER,
    "persistent_workers": "loader processes live as long as the loader does; leave it out",
}
"""Arguments of DataLoader that ``run.loader`` has no use for."""


class Steps(Protocol):
    """What a loader knows of its run."""

    def require_step(self, what: str) -> None:
        """Raise InputError outside of a step."""
        ...

    def steps_of_epoch(self, num_steps: int) -> Iterator[int]:
        """What is left of an epoch."""
        ...


class _Collated:
    """A data set with a ``collate`` of the script's; everything else is the data set's own."""

    def __init__(self, dataset: Any, collate: Collate) -> None:
        self._dataset = dataset
        self.collate = collate

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


class RunLoader:
    """Batches of a data set, from where the run stands, over all epochs without an end.

    ``next(loader)`` gives the next batch, within ``run.steps``. Within ``run.epochs``,
    ``for batch in loader`` gives the rest of the epoch, one step for each batch. The order of an
    epoch and what items draw come from (seed, epoch, position): nothing depends on how a process
    got there, on ``num_workers``, or on prefetching.

    Attributes:
        dataset: what it was made of, for ``len(loader.dataset)``.
    """

    def __init__(self, run: Steps, dataset: Any, plan: BatchPlan, loader: Loader) -> None:
        self.dataset = dataset
        self._run = run
        self._plan = plan
        self._loader = loader
        self._epoch = self._step_in_epoch = 0
        self._batches: Iterator[Microbatch] | None = None
        self._plain: dict[str, Any] | None = None
        self._has_told = False

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._plan.num_steps(self._epoch)

    def __next__(self) -> Any:
        """The next batch. Raises InputError outside of a step; LoaderError names a sample."""
        self._run.require_step("next(loader)")
        if self._batches is None:
            self._batches = self._loader.steps(self._epoch, self._step_in_epoch)
        self._tell_if_changed()
        taken = next(self._batches)
        self._plain = None if self._has_told else _plain_attributes(self.dataset)
        self._epoch, self._step_in_epoch = taken.epoch, taken.step_in_epoch + 1
        return taken.batch

    def __iter__(self) -> Iterator[Any]:
        """What is left of this epoch, each batch a step of the run."""
        for _ in self._run.steps_of_epoch(len(self)):
            yield next(self)

    def _tell_if_changed(self) -> None:
        """Warn, once, of a data set that the loop changes: who fetches sees it late, or never."""
        now = _plain_attributes(self.dataset)
        if self._plain is None or now is None or now == self._plain:
            return
        self._has_told = True
        before = self._plain
        # As dicts are compared: a long text that is the same object costs nothing, nan is itself.
        changed = next(n for n in {**before, **now} if [now.get(n)] != [before.get(n)])
        warn_of_inexactness(
            f"{type(self.dataset).__name__}.{changed} changed while batches are read: loader "
            f"processes and what is fetched ahead do not see it, a resume does; give the data set "
            f"set_epoch(epoch), which is called before each epoch"
        )

    def close(self) -> None:
        """End the loader's processes."""
        self._batches = None
        self._loader.close()

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, by what was taken; what was prefetched does not count."""
        return {"epoch": self._epoch, "step_in_epoch": self._step_in_epoch}

    def move_to(self, epoch: int, step_in_epoch: int) -> None:
        """Let the next batch be this one of its epoch; nothing is done where it is that already."""
        place = (self._epoch, self._step_in_epoch)
        is_end = step_in_epoch == 0 and place == (epoch - 1, self._plan.num_steps(self._epoch))
        if place != (epoch, step_in_epoch) and not is_end:
            self.load_state_dict({"epoch": epoch, "step_in_epoch": step_in_epoch})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a place."""
        self.close()
        self._epoch, self._step_in_epoch = state["epoch"], state["step_in_epoch"]


def _plain_attributes(dataset: Any) -> dict[str, Any] | None:
    """Numbers and text that a data set has; None of one that is told each epoch."""
    if callable(getattr(dataset, "set_epoch", None)):
        return None
    attributes = getattr(dataset, "__dict__", {})
    return {name: value for name, value in attributes.items() if isinstance(value, PLAIN)}


def require_own(others: Mapping[str, Any]) -> None:
    """Raise InputError for the first argument that ``run.loader`` does not take."""
    for name, value in others.items():
        if name == "shuffle" and value is True:
            continue  # it does
        why = WHY_NOT.get(name, f"it takes {TAKEN}; leave it out")
        raise InputError(f"run.loader({name}=…): {why}")


def _require_items(what: str, dataset: Any) -> None:
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if isinstance(dataset, IterableDataset) or missing:
        raise InputError(
            f"{what}: expected a data set with __len__ and __getitem__, so that any place of it "
            f"can be gone back to, found {kind_of(dataset)}"
        )
    if not len(dataset):
        raise InputError(f"{what}: expected at least one item, found {kind_of(dataset)} of none")


def build_loader(  # noqa: PLR0913  # the names of torch's DataLoader
    run: Steps,
    dataset: Any,
    *,
    batch_size: int,
    drop_last: bool,
    num_workers: int,
    prefetch_factor: int,
    collate_fn: Collate | None,
    worker_init_fn: WorkerInit | None,
    pin_memory: bool,
    seed: int,
    copies: Copies | None = None,
) -> RunLoader:
    """A loader that is part of the run; with ``copies``, its batches are this process's parts.

    Raises InputError where the data set has no items, or no equal parts.
    """
    _require_items("run.loader(…)", dataset)
    batch_size = arguments.whole_number("run.loader(batch_size=…)", batch_size, 1)
    drop_last = arguments.flag("run.loader(drop_last=…)", drop_last)
    if drop_last and len(dataset) < batch_size:
        raise InputError(
            f"run.loader(batch_size={batch_size}, drop_last=True): the data set has {len(dataset)} "
            f"items, which make no batch: give a smaller batch_size"
        )
    arguments.function("run.loader(collate_fn=…)", collate_fn)
    arguments.function("run.loader(worker_init_fn=…)", worker_init_fn)
    plan = FixedSizePlan(len(dataset), batch_size, drop_last, seed, own_permutation(dataset))
    loader = Loader(
        dataset if collate_fn is None else _Collated(dataset, collate_fn),
        plan,
        num_workers=arguments.whole_number("run.loader(num_workers=…)", num_workers, 0),
        prefetch_factor=arguments.whole_number("run.loader(prefetch_factor=…)", prefetch_factor, 1),
        seed=seed,
        should_pin=arguments.flag("run.loader(pin_memory=…)", pin_memory),
        worker_init_fn=worker_init_fn,
        start_method="fork",  # as DataLoader: a script rarely guards its main module
        shares=None if copies is None else copies.shares(batch_size, len(dataset), drop_last),
    )
    return RunLoader(run, dataset, plan, loader)


def adopted_loader(
    run: Steps, loader: DataLoader[Any], seed: int, num_workers: int | None
) -> RunLoader:
    """The batches of a DataLoader as part of the run; ``num_workers`` in the place of its own.

    Raises InputError where it gives none that could be gone back to.
    """
    dataset, batch_sampler = loader.dataset, loader.batch_sampler
    _require_items("the training DataLoader", dataset)
    if batch_sampler is None:
        raise InputError(
            "DataLoader(batch_size=None): its items are batches; give it items and a batch_size, "
            "or a batch_sampler"
        )
    exact = Loader(
        _Collated(dataset, loader.collate_fn),
        _plan_of(dataset, batch_sampler, seed),
        num_workers=loader.num_workers if num_workers is None else num_workers,
        prefetch_factor=loader.prefetch_factor or 2,
        seed=seed,
        should_pin=loader.pin_memory and torch.cuda.is_available(),
        worker_init_fn=loader.worker_init_fn,
        start_method="fork",
    )
    return RunLoader(run, dataset, exact.plan, exact)


def _plan_of(dataset: Any, batch_sampler: Any, seed: int) -> BatchPlan:
    sampler: Any = getattr(batch_sampler, "sampler", None)
    is_plain = type(batch_sampler) is BatchSampler and type(sampler) is RandomSampler
    if is_plain and not sampler.replacement and sampler.num_samples == len(dataset):
        size, drops_last = batch_sampler.batch_size, batch_sampler.drop_last
        return FixedSizePlan(len(dataset), size, drops_last, seed, own_permutation(dataset))
    return SampledPlan(batch_sampler, seed)
