"""The steps of a run, counted by the batches that somebody else's trainer asks for.

Between two optimizer steps, a trainer logs, validates, calls its callbacks, and then asks for the
next batch. That is the one place where its state is whole, whatever trainer it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from holdfast.training.errors import CheckpointError
from holdfast.training.integrations.newest import Newest, newest_state
from holdfast.training.own_loop.run import Run

TRAINER = "trainer"


class SteppedRun:
    """A run whose steps a trainer takes.

    A step ends where the next batch is asked for once the trainer has counted another update of
    its optimizer; batches that are accumulated belong to one step, and so do validations.
    """

    def __init__(
        self, run: Run, kept: Callable[[], Mapping[str, Any]], num_updates: Callable[[], int]
    ) -> None:
        """``kept`` gives what the run keeps; it is called before the first step, once.

        ``num_updates`` gives the updates that the trainer has counted.
        """
        self._run, self._kept, self._num_updates = run, kept, num_updates
        self._has_kept = self._is_in_step = False
        self._num_before = 0
        self._losses: list[Tensor] = []
        self.newest: Newest | None = newest_state(run.opened.run, TRAINER)

    def before_batch(self) -> None:
        """To be called before each batch. The first call puts everything back."""
        if self._is_in_step:
            if self._num_updates() == self._num_before:
                return
            self._run.end_step()
            self._is_in_step = False
        self.restore()
        self._run.begin_step()
        self._is_in_step = True
        self._losses.clear()
        self._num_before = self._num_updates()

    def restore(self) -> None:
        """Put everything back, once.

        Raises CheckpointError where it is not what ``newest`` told, by which the trainer has
        found its place.
        """
        if self._has_kept:
            return
        self._has_kept = True
        self._run.keep(**self._kept())
        self._run.restore()
        told = 0 if self.newest is None else self.newest.step
        if self._run.step != told:
            raise CheckpointError(
                f"step {told} was looked for and step {self._run.step} restored, because a newer "
                f"checkpoint was damaged and is set aside, or another process trains this run: "
                f"start again"
            )

    def log(self, loss: Tensor, *, is_mean: bool) -> None:
        """The loss of a batch; a step's is the sum or the mean of those of its batches."""
        self._losses.append(loss.detach())
        total = sum(self._losses[1:], start=self._losses[0])
        self._run.log(loss=total / len(self._losses) if is_mean else total)

    def validated(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Metrics of the weights as they are now; what is told outside of a step is left out."""
        if self._is_in_step:
            self._run.validated(**metrics)

    def finish(self) -> None:
        """Training is over: end the step, save, and let the run go."""
        self.restore()
        if self._is_in_step:
            self._run.end_step()
            self._is_in_step = False
        self._run.complete()
