"""Which rows have all their gradients while a backward pass is still going on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from holdfast.training.errors import ExperimentError


class EarlyRows:
    """Tells of rows, in their order, once each of their parameters has its gradient.

    That is right where a gradient comes once in a backward pass. Reentrant activation
    checkpointing brings it in parts; so the first pass is only watched, and where one came twice,
    nothing is ever told early.
    """

    def __init__(
        self, rows: Sequence[Mapping[str, nn.Parameter]], tell: Callable[[int], None]
    ) -> None:
        """``tell`` is given the number of each row that is complete."""
        self._tell = tell
        self._sizes = [len(row) for row in rows]
        self._is_watching = False
        self._has_watched = False
        self._comes_twice = False
        self._missing: list[int] = []
        self._came: set[str] = set()
        self._next = 0
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._hook(number, name)
            )
            for number, row in enumerate(rows)
            for name, parameter in row.items()
        ]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The backward pass that completes the gradients happens within the block."""
        self._missing, self._came, self._next = [*self._sizes], set(), 0
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
        self._has_watched = True

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, number: int, name: str) -> Callable[[Tensor], None]:
        def came(_: Tensor) -> None:
            if self._is_watching:
                self._take(number, name)

        return came

    def _take(self, number: int, name: str) -> None:
        if name in self._came:
            self._comes_twice = True
            if number < self._next:
                raise ExperimentError(
                    f"the gradient of {name} came twice in one backward pass, and so far came "
                    f"once: let activation checkpointing have use_reentrant=False"
                )
            return
        self._came.add(name)
        self._missing[number] -= 1
        if not self._has_watched or self._comes_twice:
            return
        while self._next < len(self._missing) and self._missing[self._next] == 0:
            self._next += 1
            self._tell(self._next - 1)
