"""A training that has ended: its state is put back, and nothing of the run is changed."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.training.checkpointing.loading import load_checkpoint
from holdfast.training.checkpointing.manifest import local_folder, manifest_of
from holdfast.training.errors import InputError
from holdfast.training.loop.experiment_state import Stateful, experiment_checkpoint
from holdfast.training.own_loop.kept import Kept
from holdfast.training.own_loop.opening import Opened
from holdfast.training.own_loop.state import Place, Whole, state_of


class FinishedTraining:
    """In the place of a segment: what a script keeps is what training ended with."""

    def __init__(
        self, opened: Opened, kept: Kept, loaders: Mapping[str, Stateful], place: Place
    ) -> None:
        """Raises InputError where the run has no checkpoint, else what restoring raises."""
        path = experiment_checkpoint(opened.run)
        if path is None:
            raise InputError(f"{opened.run.path} has no checkpoint: train it first")
        self.state = state_of(kept, opened.config, Whole(kept, loaders, place))
        folder = local_folder(path)
        restored = load_checkpoint(folder, manifest_of(folder))
        self.state.restore(restored.tensors, restored.state)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.state.counters.step
