"""Digests of the weights that a run begins with: what makes it another run if it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Protocol, runtime_checkable

from holdfast.training.configuration.schema import TrainConfig
from holdfast.training.errors import DataNotFoundError
from holdfast.training.weights.reading import ALGORITHM, file_digest, weights_file

NOT_OF_A_BASE = "__pycache__"


@runtime_checkable
class OnBase(Protocol):
    """What an experiment has whose model is built on weights that it reads itself."""

    def base_files(self) -> Sequence[Path | str]:
        """Files and folders of the base; a text is the name of an installed package."""
        ...


def weight_files(experiment: object, config: TrainConfig) -> dict[str, str]:
    """Digests of ``initial_weights`` and of the experiment's ``base``, where there are any.

    Raises:
        DataNotFoundError: one is not there.
        StorageError, CheckpointCorruptError: one cannot be read.
    """
    digests = {}
    if config.initial_weights is not None:
        digests["initial_weights"] = file_digest(weights_file(config.initial_weights))
    if isinstance(experiment, OnBase):
        digests["base"] = _digest_of_base(experiment.base_files())
    return digests


def _digest_of_base(places: Iterable[Path | str]) -> str:
    """Of the names and contents of all files; where they lie does not matter."""
    hasher = hashlib.new(ALGORITHM)
    for place in places:
        for name, file in _files_of(place):
            hasher.update(f"{name} {file_digest(file)}\n".encode())
    return f"{ALGORITHM}:{hasher.hexdigest()}"


def _files_of(place: Path | str) -> Iterator[tuple[str, Path]]:
    if isinstance(place, str):
        yield from _files_of_package(place)
    elif place.is_dir():
        for file in sorted(place.rglob("*")):
            if file.is_file() and NOT_OF_A_BASE not in file.parts:
                yield file.relative_to(place).as_posix(), file
    elif place.is_file():
        yield "", place
    else:
        raise DataNotFoundError(f"base_files() names {place}, which is not there")


def _files_of_package(name: str) -> Iterator[tuple[str, Path]]:
    try:
        found = files(name)
    except (ModuleNotFoundError, TypeError) as error:
        raise DataNotFoundError(
            f"base_files() names the package {name}, which is not installed; a file is named by a "
            f"Path"
        ) from error
    with as_file(found) as folder:
        yield from _files_of(folder)
