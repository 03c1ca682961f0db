"""What a model returns, as flat tensors with names, and as it was.

A tensor, or any nest of tensors: tuples, named tuples, dicts, dataclasses, and the output objects
of transformers. What is None is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from holdfast.training.errors import ExportError, kind_of
from holdfast.training.experiment.nests import Path, leaves, mapped


@dataclass(frozen=True)
class OutputStructure:
    """How a model returns its outputs, and how flat outputs become that again.

    Attributes:
        names: one per output, in order.
        is_vector: the model returns ``[B]``, which is exported as ``[B, 1]``.
        template: what the model returned, with the number of an output in its place.
    """

    names: tuple[str, ...]
    is_vector: tuple[bool, ...]
    template: Any

    def rebuild(self, flat: Sequence[Tensor]) -> Any:
        """What the model itself would have returned."""
        own = [t[:, 0] if v else t for t, v in zip(flat, self.is_vector, strict=True)]
        return mapped(lambda number: None if number is None else own[number], self.template)


def flatten(returned: Any, wanted: tuple[str, ...]) -> tuple[OutputStructure, list[Tensor]]:
    """What a model returned, as its structure and flat tensors.

    ``wanted`` are the names of the outputs where they have none of their own. Raises ExportError.
    """
    found = [(path, leaf) for path, leaf in leaves(returned) if leaf is not None]
    for path, leaf in found:
        if not isinstance(leaf, Tensor):
            where = f" as {'.'.join(map(str, path))}" if path else ""
            raise ExportError(
                f"the model returns {kind_of(leaf)}{where}; an exported model returns a "
                f"tensor, or a tuple, dictionary, named tuple or dataclass of tensors: leave out "
                f"what is none"
            )
    if not found:
        raise ExportError(
            f"the model returns {kind_of(returned)} without a tensor; an exported model "
            f"returns a tensor, or a tuple, dictionary, named tuple or dataclass of tensors"
        )
    names = _names([path for path, _ in found])
    if wanted and not isinstance(returned, Mapping):
        names = wanted
    if len(names) != len(found):
        raise ExportError(f"the model returns {len(found)} outputs, export_spec() names {names}")
    numbers = iter(range(len(found)))
    template = mapped(lambda leaf: None if leaf is None else next(numbers), returned)
    flat = [leaf for _, leaf in found]
    return OutputStructure(names, tuple(t.dim() == 1 for t in flat), template), flat


def flat_outputs(returned: Any) -> list[Tensor]:
    """The tensors that a model returned, in order."""
    return flatten(returned, ())[1]


def as_columns(tensor: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1]``: serving systems do not agree on what ``[B]`` is."""
    return tensor[:, None] if tensor.dim() == 1 else tensor


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """A lone tensor is ``output``, the second of a tuple ``output_1``, that in a dict as there."""
    return tuple(
        "_".join(map(str, path if path and isinstance(path[0], str) else ("output", *path)))
        for path in paths
    )
