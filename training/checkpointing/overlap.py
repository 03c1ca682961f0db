"""A snapshot beside the computation: what is copied is not changed before its copy is there.

On a GPU copies run on a stream of their own while the next forward and backward run. Weights, the
state of optimizers and averages are changed by updates alone: whoever is about to change them calls
``before_change``, and the device, not the host, waits for the copies. All else is copied at once.

A model may also change its weights elsewhere: one that scales them in its forward pass, a step that
clips them first. Which ones do is learned from a whole step, and these are copied at once, too; a
snapshot beside which another one changed is none. It shows by torch's count of changes, and, for
what was written past it (``parameter.data``), by the sum of the sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from holdfast.training.device.copy_stream import CopyStream

Tensors = Mapping[str, Mapping[str, Tensor]]
"""By file stem and name."""
Names = Mapping[str, Collection[str]]
"""By file stem."""
Changed = Callable[[], list[str]]
"""Names of what was changed; may wait for the device, and may be called by any thread."""


class Overlap:
    """One snapshot at a time beside the computation, from ``begin`` to ``before_change``."""

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream
        self._open: _Open | None = None
        self._hasty: Future[list[str]] | None = None
        self._found_late: set[str] = set()

    def learn(self, tensors: Tensors, late: Names, thread: Executor) -> None:
        """Let the step that comes show which weights are changed outside updates.

        ``thread`` reads what it showed. Does nothing where that is known.
        """
        if self._hasty is not None:
            return

        def then(changed: Changed) -> None:
            self._hasty = thread.submit(changed)

        self.begin([], weights_among(tensors, late), then)

    def late(self, tensors: Tensors, late: Names) -> Names:
        """Which of ``late`` can be copied beside the computation: none before a step was seen."""
        if self._hasty is None:
            self._open = None
            return {}
        places = {torch.device("cpu"), self._stream.device}
        if not all(t.device in places for inner in tensors.values() for t in inner.values()):
            return {}
        hasty = {*self._hasty.result(), *self._found_late}
        return {**late, "model": set(late.get("model", ())) - hasty}

    def copy_at_once(self, names: Iterable[str]) -> None:
        """From now on these weights are not copied late: they were changed beside a snapshot."""
        self._found_late.update(names)

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Call ``before_change`` before each update of these, whoever asks for it."""
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: self.before_change())

    def begin(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        watched: Mapping[str, Tensor],
        then: Callable[[Changed], None],
    ) -> None:
        """Copy each second into the first, up to ``before_change``, which calls ``then``.

        ``then`` is told which of the watched tensors were changed in between.
        """
        assert self._open is None, "a snapshot is beside the computation already"
        self._stream.copy(pairs)
        self._open = _Open(pairs, _Marks(watched), then)

    def before_change(self) -> None:
        """Weights, optimizers' state or averages are about to change. Does not wait itself."""
        if self._open is None:
            return
        done, self._open = self._open, None
        self._stream.hold_back()
        done.then(done.marks.changed())

    def wait(self) -> None:
        """Return when all copies so far are done; in any thread."""
        self._stream.wait()


@dataclass(frozen=True)
class _Open:
    """What is beside the computation; holds the memory that is read until nobody reads it."""

    pairs: Sequence[tuple[Tensor, Tensor]] = field(repr=False)
    marks: _Marks
    then: Callable[[Changed], None]


class _Marks:
    """By what it shows that tensors were changed. Nothing here waits for the device."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        counted = {name: one for name, one in tensors.items() if not one.is_inference()}
        self._versions = {name: tensor._version for name, tensor in counted.items()}
        self._sizes = _sizes(tensors)

    def changed(self) -> Changed:
        """Which were changed since."""
        versions = self._versions.items()
        counted = [name for name, version in versions if self._tensors[name]._version != version]
        differ = [
            (names, sizes.view(torch.int64) != before.view(torch.int64))
            for (names, sizes), (_, before) in zip(_sizes(self._tensors), self._sizes, strict=True)
        ]

        def names() -> list[str]:
            found = (
                name
                for names, flags in differ
                for name, flag in zip(names, flags.tolist(), strict=True)
                if flag
            )
            return sorted({*counted, *found})

        return names


@torch.no_grad()
def _sizes(tensors: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Names, and the sum of the sizes of each of these tensors' numbers, in fp64."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize > 1:
            groups.setdefault((tensor.device, tensor.dtype), []).append(name)
    return [
        (names, torch.stack(torch._foreach_norm([tensors[n] for n in names], 1, torch.float64)))
        for names in groups.values()
    ]


def weights_among(tensors: Tensors, late: Names) -> dict[str, Tensor]:
    """The weights among what is copied late: what code of others may change at any time."""
    return {name: tensors["model"][name] for name in late.get("model", ())}
