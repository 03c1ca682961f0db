"""The names by which artifacts call our classes.

TorchScript and ``.pt2`` write the module of each class into their files, although nobody reads it.
What was exported once is called by its first name for ever, so that a move of our source files
moves no byte of a bundle. New classes need no row: their first name is the one they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

FIRST_NAMES = {
    "holdfast.training.export.guard": "training.export.guard",
    "holdfast.training.experiments.digits": "training.experiments.digits",
    "holdfast.training.experiments.turbofan.model": "training.experiments.turbofan_model",
    "holdfast.training.experiments.translation.model": "training.experiments.translation_model",
}


@contextmanager
def first_names(model: nn.Module) -> Iterator[None]:
    """Inside, the classes of a model's modules are called as they were when first exported."""
    moved = {type(module) for module in model.modules() if type(module).__module__ in FIRST_NAMES}
    current = {moved_class: moved_class.__module__ for moved_class in moved}
    try:
        for moved_class, name in current.items():
            moved_class.__module__ = FIRST_NAMES[name]
        yield
    finally:
        for moved_class, name in current.items():
            moved_class.__module__ = name
