"""A few samples of a data set in the place of all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

from holdfast.training.configuration.schema import Split
from holdfast.training.data.fetching import Fetcher
from holdfast.training.errors import InputError
from holdfast.training.experiment.protocol import Dataset, Experiment

NUM_ROWS = 40


def require_picklable(dataset: Dataset) -> None:
    """Raise InputError where a data set cannot travel to loader processes."""
    try:
        pickle.dumps(Fetcher(dataset, seed=0))
    except (AttributeError, TypeError, ValueError, pickle.PicklingError) as error:
        raise InputError(
            f"the data set cannot be sent to a loader process: {error}; define its class and "
            "functions at the top of a module, or set data.num_workers=0"
        ) from error


class FewRows:
    """Some rows of a data set, which is otherwise as it was."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self._dataset = dataset
        self._indices = list(indices)
        if hasattr(dataset, "fetch"):
            self.fetch = self._fetch

    @classmethod
    def ends(cls, dataset: Dataset, batch_size: int) -> FewRows:
        """The first two batches and the last one, which may be smaller."""
        num = len(dataset)
        first, last = 2 * batch_size, (num - 1) // batch_size * batch_size
        return cls(dataset, [*range(min(num, first)), *range(max(last, first), num)])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self._indices[index]]

    def _fetch(self, indices: Sequence[int]) -> Any:
        return self._dataset.fetch([self._indices[index] for index in indices])  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dataset", "_indices", "fetch"):
            raise AttributeError(name)
        return getattr(self._dataset, name)


def of_few_rows(experiment: Experiment, num: int = NUM_ROWS) -> Experiment:
    """The experiment with a few rows in each split; those of ``test`` are of ``validation``.

    They are the first ones; where sizes may vary, some that are spread over all.
    """
    is_spread = bool(getattr(experiment, "dynamic_dimensions", {}))

    def dataset(split: Split) -> FewRows:
        whole = experiment.dataset("validation" if split == "test" else split)
        num_rows = min(num, len(whole))
        if not is_spread:
            return FewRows(whole, range(num_rows))
        return FewRows(whole, [row * len(whole) // num_rows for row in range(num_rows)])

    few = copy.copy(experiment)
    object.__setattr__(few, "dataset", dataset)
    return few
