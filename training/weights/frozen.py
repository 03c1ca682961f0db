"""Parameters that are frozen when training begins, and left out of all that is saved.

``model()`` makes them anew for every process, from the same file or from the run's seed. Their
digest is part of each full checkpoint, and is compared where one is restored or its weights are
used: on another base, weights that were trained on this one are worth nothing.

They are watched, too. After each step torch's own counters tell of a parameter that was written
to, unfrozen or put elsewhere; at each end of an epoch sums of their bits tell of what was written
past the counters, through ``.data``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.checkpointing.digests import Bytes, digest_of
from holdfast.training.checkpointing.loading import load_state_part
from holdfast.training.checkpointing.manifest import STATE_NAME
from holdfast.training.checkpointing.model_weights import load_model, split_state
from holdfast.training.configuration.schema import CheckpointConfig
from holdfast.training.errors import CheckpointMismatchError, ExperimentError
from holdfast.training.runs.stored_json import STATE, read_json

WAY_OUT = (
    "leave frozen parameters as they are, or keep them in the checkpoints with "
    "checkpoint.frozen=kept, under another run id"
)
SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenParameters:
    """The parameters of a model that do not require gradients now, under all of their names.

    Attributes:
        names: in the model's state dict.
        digest: of their names, types, shapes and bytes.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ExperimentError where none is frozen."""
        named = model.named_parameters(remove_duplicate=False)
        self._named = {name: parameter for name, parameter in named if not parameter.requires_grad}
        if not self._named:
            raise ExperimentError(
                f"checkpoint.frozen = 'left_out', and {type(model).__name__} has no frozen "
                f"parameter: let model() set requires_grad=False, or leave checkpoint.frozen out"
            )
        self._type_name = type(model).__name__
        self.names = frozenset(self._named)
        self.begin()

    def begin(self) -> None:
        """Take the parameters as they are now: changes are told from here on."""
        self.digest = digest_of(self._bytes())
        self._bits = {name: _sum_of_bits(parameter) for name, parameter in self._named.items()}
        self._mark()

    def others(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of a state dict that are not left out."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.names}

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that were saved, together with those that were left out."""
        return {**{name: value.detach() for name, value in self._named.items()}, **tensors}

    def watch(self, step: int) -> None:
        """Raise ExperimentError where one was written to, unfrozen or replaced since ``begin``."""
        for name, parameter in self._named.items():
            if parameter.requires_grad:
                raise ExperimentError(
                    f"{name} of {self._type_name} was unfrozen before or in step {step}, and "
                    f"checkpoint.frozen = 'left_out' has left it out of the checkpoints: {WAY_OUT}"
                )
            if self._marks[name] != _mark_of(parameter):
                raise self._changed(name, f"in step {step}")

    def require_same_bits(self, step: int) -> None:
        """As ``watch``, also for what was written through ``.data``; reads every parameter."""
        self.watch(step)
        for name, parameter in self._named.items():
            if _sum_of_bits(parameter) != self._bits[name]:
                raise self._changed(name, f"before step {step} ended")

    def require(self, digest: str | None) -> None:
        """Raise CheckpointMismatchError unless a checkpoint left out these very parameters.

        None is the digest of a checkpoint that left none out.
        """
        if digest not in (None, self.digest):
            raise CheckpointMismatchError(
                f"the frozen parameters of {self._type_name} are not those that were trained on: "
                f"the checkpoint's have the digest {digest}, model() returns {self.digest}: go "
                f"back to the base that the run was begun with, or take another run id"
            )

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint says of them."""
        return {"digest": self.digest, "num_parameters": len(self._named)}

    def _changed(self, name: str, when: str) -> ExperimentError:
        return ExperimentError(
            f"{name} of {self._type_name} is frozen, was left out of the checkpoints, and was "
            f"changed {when}; nothing was saved since then: {WAY_OUT}"
        )

    def _mark(self) -> None:
        self._marks = {name: _mark_of(parameter) for name, parameter in self._named.items()}

    def _bytes(self) -> Iterator[Bytes]:
        for name, parameter in sorted(self._named.items()):
            yield f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode()
            flat = parameter.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                yield flat.view(torch.uint8).numpy().data


def frozen_of(model: nn.Module, config: CheckpointConfig) -> FrozenParameters | None:
    """What is left out of the checkpoints of this model; None where all is kept.

    Raises ExperimentError where nothing is frozen that could be left out.
    """
    return FrozenParameters(model) if config.frozen == "left_out" else None


def load_saved(
    model: nn.Module,
    tensors: Mapping[str, Any],
    config: CheckpointConfig,
    checkpoint: Path | None,
) -> None:
    """Load weights as checkpoints and candidates hold them.

    Frozen parameters that were left out stay the model's. What a module keeps that is no tensor
    (``get_extra_state``) is that of the checkpoint, as there is no average of it.

    Args:
        model: as ``model()`` returns it.
        tensors: by name.
        config: says whether frozen parameters were left out.
        checkpoint: a full one of the run, whose digest of them is compared.

    Raises CheckpointMismatchError where names or shapes differ, or the base is another one.
    """
    saved = {**tensors, **_extra_state_for(model, checkpoint)}
    frozen = frozen_of(model, config)
    if frozen is None:
        load_model(model, saved)
        return
    frozen.require(recorded_digest(checkpoint))
    load_model(model, saved, frozen.names)


def recorded_extra_state(checkpoint: Path | None) -> dict[str, Any]:
    """What the model's modules kept beside tensors in a full checkpoint, by its name there."""
    if checkpoint is None:
        return {}
    state: Any = read_json(checkpoint / STATE_NAME, STATE)
    return load_state_part(checkpoint, "model") if state["model"] else {}


def _extra_state_for(model: nn.Module, checkpoint: Path | None) -> dict[str, Any]:
    """The same under the names of ``model``, which may be several such models side by side."""
    _, own = split_state(model.state_dict())
    recorded = recorded_extra_state(checkpoint) if own else {}
    return {
        name: value
        for name in own
        for key, value in recorded.items()
        if f".{name}".endswith(f".{key}")
    }


def recorded_digest(checkpoint: Path | None) -> str | None:
    """The digest of what a full checkpoint left out; None where that is nothing."""
    if checkpoint is None:
        return None
    state: Any = read_json(checkpoint / STATE_NAME, STATE)
    return digest_in(state)


def digest_in(state: Mapping[str, Any]) -> str | None:
    """As ``recorded_digest``, of the content of ``state.json``."""
    found = state.get("frozen")
    return str(found["digest"]) if isinstance(found, Mapping) else None


def _mark_of(parameter: Tensor) -> tuple[int, int]:
    return parameter._version, parameter.data_ptr()


def _sum_of_bits(parameter: Tensor) -> Tensor:
    """Changes with nearly every change of a parameter, and stays on its device."""
    real = torch.view_as_real(parameter.detach()) if parameter.is_complex() else parameter.detach()
    return real.view(SAME_SIZE[real.element_size()]).sum(dtype=torch.int64)
