"""A step that was done twice: what differs, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from holdfast.training.data.loader import Microbatch
from holdfast.training.experiment.nests import children
from holdfast.training.rehearsal.captured import differing, shown
from holdfast.training.rehearsal.findings import Severity
from holdfast.training.rehearsal.hidden import Fingerprints, array_digest, tensor_digest
from holdfast.training.rehearsal.telling import Telling

ORDER = ("generator", "network", "optimizer", "value", "tensor")
SURE = ("generator", "network", "optimizer")
TO_SAVE = (
    "return it from the experiment's state_dict() and take it in load_state_dict(), make it a "
    "persistent buffer of the model, or draw from the global generators"
)


@dataclass(frozen=True)
class Repeated:
    """One of the two times.

    Attributes:
        begin: digests of the state before the first step.
        end: digests of the state after the second step.
        hidden: what the objects held before the second step, beyond the state.
        batches: microbatches of the second step.
        changed_globals: global names of the experiment's module that have changed.
    """

    begin: Mapping[str, str]
    end: Mapping[str, str]
    hidden: Fingerprints
    batches: list[Microbatch]
    changed_globals: list[str]


def tell_differences(telling: Telling, first: Repeated, again: Repeated, *, is_exact: bool) -> None:
    """Tell what differs, by name; nothing is promised with ``train.mode=speed``: then as notes."""
    severity: Severity = "warning" if is_exact else "note"
    if begin := differing(first.begin, again.begin):
        telling.find(
            severity,
            f"the model was another one when it was built again: {shown(begin)} differ; draw in "
            "the constructor, in model() and in dataset() from the global generators, which are "
            "seeded",
        )
    if batches := differing(tensors_in(first.batches), tensors_in(again.batches)):
        telling.find(
            severity,
            f"the data set gives another batch in another process: {shown(batches)} differ; it "
            "must depend on the place in the run alone",
        )
    hidden = [*first.changed_globals, *_hidden(first.hidden, again.hidden)]
    if end := differing(first.end, again.end):
        telling.find(severity, _inexact(end, hidden))
    elif sure := [path for path in hidden if _kind(first.hidden, again.hidden, path) in SURE]:
        message = f"{shown(sure)} changed while training and is in no checkpoint: {TO_SAVE}"
        telling.find(severity, message)


def tensors_in(value: Any, path: str = "batch") -> dict[str, str]:
    """Digests of what a nest holds, by path; of microbatches, that of their batches."""
    if isinstance(value, Microbatch):
        return tensors_in(value.batch, path)
    if isinstance(value, Tensor):
        return {path: tensor_digest(value)}
    if isinstance(value, np.ndarray):
        return {path: array_digest(value)}
    pairs = children(value)
    if pairs is None:
        return {path: repr(value)[:200]}
    parts = (tensors_in(item, f"{path}[{key!r}]") for key, item in pairs)
    return {name: digest for part in parts for name, digest in part.items()}


def _inexact(end: list[str], hidden: list[str]) -> str:
    """A resumed run would end with other bytes."""
    told = f"a run that is resumed would end with other bytes: after a step {shown(end)} differ"
    if hidden:
        return f"{told}; what is in no checkpoint and has changed: {shown(hidden)}: {TO_SAVE}"
    return (
        f"{told}, and nothing that was kept explains it: an operator that is not deterministic, "
        "the time, or a generator of a library; find it, or give exactness up with train.mode=speed"
    )


def _hidden(first: Fingerprints, again: Fingerprints) -> list[str]:
    """Paths that differ between objects that trained and restored ones, the likely ones first."""
    paths = [path for path in first.keys() | again.keys() if first.get(path) != again.get(path)]
    return sorted(paths, key=lambda path: (ORDER.index(_kind(first, again, path)), path))


def _kind(first: Fingerprints, again: Fingerprints, path: str) -> str:
    found = first.get(path) or again.get(path)
    return found[0] if found is not None else "value"
