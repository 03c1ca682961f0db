"""A training file of the usual kind, and what a run can begin with of it.

Such a file is a dict that ``torch.save`` wrote: the model's state dict, the optimizer's, the
scheduler's, and where training stood. The weights are taken over. The rest is not, and it is said
why: an optimizer's state goes by the order of the parameters, which nobody can check, and a run
that counted some of its epochs elsewhere could not promise its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from holdfast.training.averages.averaging import write_weights
from holdfast.training.errors import DataFormatError, InputError
from holdfast.training.runs.durable_json import storage_error, sync_folder
from holdfast.training.weights.initial import without_wrappers
from holdfast.training.weights.reading import (
    TorchFile,
    is_safetensors,
    read_torch_file,
    weights_file,
)

SUFFIX = ".safetensors"
COUNTERS = ("epoch", "epochs", "step", "global_step", "iteration", "iter_num", "iter")
NOT_OPTIMIZER = (
    "not taken over: its state goes by the order of parameters; a run begins with its own, and "
    "warmup.num_steps lets it settle"
)
NOT_SCHEDULER = "not taken over: say in [scheduler] and [optimizer] what is left of it"
NOT_COUNTER = "not taken over: a run counts from 0; train.num_epochs is what is left"
NOT_OTHER = "not taken over"


@dataclass(frozen=True)
class Entry:
    """What a file holds under one name, and what becomes of it."""

    name: str
    content: str
    fate: str
    is_taken: bool = False


@dataclass(frozen=True)
class Conversion:
    """What was written, and from what."""

    file: Path
    target: Path
    digest: str
    entries: tuple[Entry, ...]

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "file": str(self.file),
            "to": str(self.target),
            "digest": self.digest,
            "entries": [asdict(entry) for entry in self.entries],
        }


def convert(file: Path, target: Path | None = None, entry: str | None = None) -> Conversion:
    """Write the weights of a file of ``torch.save`` as safetensors.

    Args:
        file: the file.
        target: where to; None is beside it, with another ending. It must not be there.
        entry: what the weights are called in it; None looks for the usual names.

    Raises:
        InputError: it is no such file, it needs code to be read, or the target is there.
        UnsupportedStateError: a tensor has no place in safetensors.
        StorageError: the target cannot be written.
    """
    target = target or file.with_suffix(SUFFIX)
    if file.is_dir() or is_safetensors(weights_file(file)):
        raise InputError(f"{file} needs no conversion: name it as train.initial_weights")
    if os.path.lexists(target):
        raise InputError(f"{target} is there already: name another file with --to")
    found = read_torch_file(file, entry)
    digest = _write(target, _plain(file, found.weights))
    return Conversion(file, target, digest, tuple(_entries(found)))


def _plain(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if without_wrappers(name) in plain:
            raise DataFormatError(
                f"{file} has two tensors for {without_wrappers(name)}, with and without what "
                f"DataParallel or torch.compile put before names: leave one of them out"
            )
        plain[without_wrappers(name)] = tensor
    return plain


def _write(target: Path, tensors: Mapping[str, Tensor]) -> str:
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        digest = write_weights(partial, tensors)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error("write", target, error) from error
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _entries(found: TorchFile) -> Iterator[Entry]:
    taken = _described(found.weights)
    renamed = sum(name != without_wrappers(name) for name in found.weights)
    fate = "written" + (f", {renamed} without module. or _orig_mod." if renamed else "")
    if not found.entry:
        yield Entry("(the whole file)", taken, fate, is_taken=True)
        others = {k: v for k, v in found.content.items() if not isinstance(v, Tensor)}
    else:
        yield Entry(found.entry, taken, fate, is_taken=True)
        others = {k: v for k, v in found.content.items() if k != found.entry}
        inner: Any = found.content[found.entry]
        others |= {f"{found.entry}.{k}": v for k, v in inner.items() if not isinstance(v, Tensor)}
    for name, value in others.items():
        yield Entry(str(name), _described(value), _fate(str(name), value))


def _fate(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        if "param_groups" in value:
            return NOT_OPTIMIZER
        if "last_epoch" in value or "sched" in name:
            return NOT_SCHEDULER
        if value and all(isinstance(tensor, Tensor) for tensor in value.values()):
            return f"not taken over: --entry {name} takes it in the place of the other"
    return NOT_COUNTER if name in COUNTERS else NOT_OTHER


def _described(value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"{value!r:.40}" if isinstance(value, (int, float, str)) else type(value).__name__
    if "param_groups" in value:
        return f"state of {len(value.get('state', {}))} parameters"
    tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)]
    if not tensors:
        return f"{len(value)} values"
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return f"{len(tensors)} tensors, {num_bytes / 2**20:.2f} MiB"
