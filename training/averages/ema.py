"""Moving averages of the weights, several at once, updated after every optimizer step.

What is averaged: every floating-point (or complex) parameter and persistent buffer. Averages of
half-precision weights are kept in fp32: with a decay of 0.9999 a bf16 average stops moving, as
its steps are smaller than its resolution. Double precision stays double. Integer and boolean
buffers are copied. So are buffers that begin with an infinity (a mask, an observer's range), for
the mean of two infinities is NaN, and those that take another shape or type on the way.

Running statistics of batch norm are averaged along with the weights. A copy of the newest ones
would fit the newest weights only, while averaged statistics are those of the span that the
weights were averaged over; what is constant (a scaler's mean) stays as it is, to the bit.
Whether statistics recomputed for the averaged weights are better still, selection measures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from holdfast.training.averages.posthoc_ema import power_weight
from holdfast.training.checkpointing.finite import is_slice, non_finite
from holdfast.training.checkpointing.model_weights import buffer_slots, take_buffers
from holdfast.training.configuration.schema import EmaConfig, Json
from holdfast.training.errors import CheckpointMismatchError, ExperimentError, InputError

_HALF_TYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Track:
    """One average: exponential with a decay, or a power function with an exponent gamma."""

    kind: Literal["decay", "gamma"]
    value: float
    has_warmup: bool = False

    @property
    def name(self) -> str:
        """What its tensors' names begin with, e.g. ``decay-0.999``."""
        return f"{self.kind}-{self.value!r}"

    def weight(self, step: int) -> float:
        """What the weights after ``step`` optimizer steps (1 is the first) count in the average.

        A decay with warm-up is min(decay, (1 + step) / (10 + step)); that of a power function is
        (1 - 1 / step) ** (gamma + 1).
        """
        assert step >= 1, step
        if self.kind == "gamma":
            return power_weight(self.value, step)
        decay = min(self.value, (1 + step) / (10 + step)) if self.has_warmup else self.value
        return 1.0 - decay


def tracks_of(config: EmaConfig) -> tuple[Track, ...]:
    """The averages that a configuration asks for."""
    decays = (Track("decay", decay, config.has_warmup) for decay in config.decays)
    return (*decays, *(Track("gamma", gamma) for gamma in config.posthoc_gammas))


class MovingAverages:
    """The averages of one model's weights. Starts at the weights as they are, on their device.

    Names in ``left_out`` are not averaged: frozen parameters that no checkpoint holds either.

    Attributes:
        before_change: called before averages take in weights.
    """

    def __init__(self, model: nn.Module, config: EmaConfig, left_out: Collection[str] = ()) -> None:
        self._tracks = tracks_of(config)
        self._sources = _Sources(model, left_out) if self._tracks else None
        live = self._live(model)
        self._averages: dict[str, list[Tensor]] = {
            track.name: [_average_of(tensor) for tensor in live] for track in self._tracks
        }
        self.before_change: Callable[[], None] = lambda: None
        self._changed: set[str] = set()
        self._infinite = set() if self._sources is None else set(self._sources.infinite_buffers())
        self._group()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tracks."""
        return tuple(self._averages)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` optimizer steps. Never waits for the device."""
        if self._sources is None:
            return
        self.before_change()
        self._follow()
        live = self._sources.tensors(model)
        weights = [track.weight(step) for track in self._tracks]
        for number, group in enumerate(self._groups):
            sources = self._in_average_type(number, [live[i] for i in group.indices])
            for averages, weight in zip(group.averages, weights, strict=True):
                if group.is_averaged:
                    torch._foreach_lerp_(averages, sources, weight)
                else:
                    torch._foreach_copy_(averages, sources)

    def tensors(self) -> dict[str, Tensor]:
        """The live averages by ``<track>/<name in the model's state dict>``; tied ones tied."""
        return {
            f"{track}/{name}": averages[index]
            for track, averages in self._averages.items()
            for name, index in self._names().items()
        }

    @property
    def source_names(self) -> frozenset[str]:
        """Names, in the model's state dict, of what is averaged or copied."""
        return frozenset(self._names())

    def averaged(self) -> dict[str, Tensor]:
        """As ``tensors``, without what is copied."""
        return {
            f"{track}/{name}": averages[index]
            for track, averages in self._averages.items()
            for name, index in self._names().items()
            if self._is_averaged(index, averages[index])
        }

    def state(self) -> dict[str, Json]:
        """What a restore needs besides the tensors."""
        tracks: dict[str, Json] = {"tracks": list(self._averages)}
        changed: list[Json] = [*sorted(self._changed)]
        return {**tracks, "changed": changed} if changed else tracks

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what ``tensors`` and ``state`` gave, to the bit.

        Raises CheckpointMismatchError, with nothing changed, where tracks, names, shapes or types
        are others.
        """
        if state.get("tracks") != list(self._averages):
            raise CheckpointMismatchError(
                f"the checkpoint's moving averages are {state.get('tracks')}, the configuration "
                f"asks for {list(self._averages)}; restore with the [ema] table of the run"
            )
        if self._sources is not None:
            self._changed |= set(state.get("changed", ()))
            self._follow()
            self._group()
        own = self.tensors()
        for name, average in own.items():
            saved = tensors.get(name)
            found = "nothing" if saved is None else f"{saved.dtype} {list(saved.shape)}"
            if found != f"{average.dtype} {list(average.shape)}":
                raise CheckpointMismatchError(
                    f"moving average {name} is {average.dtype} {list(average.shape)} in this "
                    f"model; the checkpoint holds {found}"
                )
        for name, average in own.items():
            average.copy_(tensors[name])

    def weights(self, track: str) -> dict[str, Tensor]:
        """A copy of a track as a state dict of the model, in the model's types; tied ones tied.

        Raises InputError for a track that is not kept.
        """
        if self._sources is None or track not in self._averages:
            raise InputError(f"there is no average {track!r}; kept are {list(self._averages)}")
        types = self._sources.types
        averages = self._averages[track]
        copies = [a.to(dtype, copy=True) for a, dtype in zip(averages, types, strict=True)]
        return {name: copies[index] for name, index in self._names().items()}

    @contextmanager
    def applied(self, model: nn.Module, track: str) -> Iterator[None]:
        """The model has a track's weights within the block, and its own, to the bit, after it."""
        weights = self.weights(track)
        state = model.state_dict()
        own = {name: state[name].clone() for name in weights}
        _put_into(model, weights)
        try:
            yield
        finally:
            _put_into(model, own)

    def _live(self, model: nn.Module) -> list[Tensor]:
        return [] if self._sources is None else self._sources.tensors(model)

    def _names(self) -> dict[str, int]:
        return {} if self._sources is None else self._sources.names

    def _is_averaged(self, index: int, tensor: Tensor) -> bool:
        is_number = tensor.is_floating_point() or tensor.is_complex()
        return is_number and index not in self._copied

    def _group(self) -> None:
        """Put tensors together that one fused call can take."""
        copied = self._infinite | self._changed
        self._copied = {index for name, index in self._names().items() if name in copied}
        tracks = self._averages.values()
        self._groups = [
            _Group(
                indices,
                [[averages[i] for i in indices] for averages in tracks],
                self._is_averaged(indices[0], next(iter(tracks))[indices[0]]),
            )
            for indices in self._grouped()
        ]
        self._converted: dict[int, list[Tensor]] = {}

    def _follow(self) -> None:
        """Copy, from now on, the buffers that have become of another kind than they were."""
        assert self._sources is not None
        if self._sources.is_as_it_was():
            return
        before = self._sources
        own = self.tensors()
        self._sources = _Sources(before.model, before.left_out)
        live = self._sources.tensors(before.model)
        self._changed |= {
            name
            for name in self._sources.names
            if before.kinds.get(name) != self._sources.kinds[name]
        }
        self._averages = {
            track: [
                own[f"{track}/{name}"] if name not in self._changed else _average_of(live[index])
                for index, name in enumerate(self._sources.first_names)
            ]
            for track in self._averages
        }
        self._group()

    def _grouped(self) -> list[list[int]]:
        """Indices of tensors that one fused call can take: same device and same types."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        types = () if self._sources is None else self._sources.types
        for index, average in enumerate(next(iter(self._averages.values()), ())):
            is_copied = index in self._copied
            key = (type(average), average.device, average.dtype, types[index], is_copied)
            groups.setdefault(key, []).append(index)
        return list(groups.values())

    def _in_average_type(self, group: int, sources: list[Tensor]) -> list[Tensor]:
        """Half-precision weights as fp32, in memory that is used again at every step."""
        if sources[0].dtype not in _HALF_TYPES:
            return sources
        if group not in self._converted:
            self._converted[group] = [torch.empty_like(s, dtype=torch.float32) for s in sources]
        torch._foreach_copy_(self._converted[group], sources)
        return self._converted[group]


class _Group(NamedTuple):
    """Tensors that one fused call takes: their indices, and their averages by track."""

    indices: list[int]
    averages: list[list[Tensor]]
    is_averaged: bool


class _Sources:
    """Finds the distinct tensors of a model's state dict quickly, at every step.

    The state dict is walked once; afterwards each tensor is looked up where its module keeps it,
    because a buffer may be assigned anew in ``forward``.

    Attributes:
        names: index of the tensor by each of its names in the state dict.
        first_names: the first name of each tensor, by index.
        types: of the tensors, by index.
        kinds: shape and type of each buffer; None for what is a parameter, or not there.
    """

    def __init__(self, model: nn.Module, left_out: Collection[str] = ()) -> None:
        self.model = model
        self.left_out = left_out
        self.names: dict[str, int] = {}
        self.first_names: list[str] = []
        self.types: list[torch.dtype] = []
        self._slots: list[tuple[dict[str, Any], str]] = []
        slots = _slots(model)
        state = model.state_dict(keep_vars=True)
        first_names: dict[tuple[Any, ...], int] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or name in left_out:
                continue
            if name not in slots:
                raise ExperimentError(
                    f"{type(model).__name__} has {name} in its state dict, which is neither a "
                    "parameter nor a buffer; moving averages cannot follow it: register it, or "
                    "leave ema.decays and ema.posthoc_gammas empty"
                )
            index = first_names.setdefault(_identity(name, tensor), len(self._slots))
            self.names[name] = index
            if index == len(self._slots):
                self._slots.append(slots[name])
                self.first_names.append(name)
                self.types.append(tensor.dtype)
        self._buffers = buffer_slots(model)
        known = {name: _kind(where[key]) for name, (where, key) in self._buffers.items()}
        self.kinds = {**dict.fromkeys(self.names), **known}
        self._buffer_kinds = list(known.values())

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """The distinct tensors as they are now."""
        assert model is self.model, "averages follow the model that they were made for"
        return [where[key] for where, key in self._slots]

    def is_as_it_was(self) -> bool:
        """Whether every buffer has the shape and the type that it had."""
        return self._buffer_kinds == [_kind(where[key]) for where, key in self._buffers.values()]

    def infinite_buffers(self) -> list[str]:
        """Names of buffers that hold an infinity or a NaN."""
        live = {name: where[key] for name, (where, key) in self._buffers.items()}
        return non_finite({name: tensor for name, tensor in live.items() if tensor is not None})


def _kind(tensor: Tensor | None) -> tuple[torch.Size, torch.dtype] | None:
    return None if tensor is None else (tensor.shape, tensor.dtype)


def _slots(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each parameter and buffer is kept, by its name in the state dict."""
    return {
        f"{prefix}.{key}" if prefix else key: (where, key)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for where in (module._parameters, module._buffers)
        for key in where
    }


def _identity(name: str, tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    if is_slice(tensor):
        return (id(tensor),)
    if tensor.numel() == 0:
        return (name,)
    return (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())


def _average_of(tensor: Tensor) -> Tensor:
    """A copy to start from, in the type that averages of such tensors are kept in."""
    dtype = torch.float32 if tensor.dtype in _HALF_TYPES else tensor.dtype
    return tensor.detach().to(dtype, copy=True)


def _put_into(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights; a buffer that has changed in shape since takes that of what is loaded."""
    take_buffers(model, weights)
    model.load_state_dict(weights, strict=False)  # strict would ask for get_extra_state, too
