"""Champions of the small experiments, exported once for all tests."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from holdfast.training.averages.averaging import write_weights
from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.experiment.protocol import Context
from holdfast.training.export.artifacts import open_champion, write_artifacts
from holdfast.training.export.formats import formats
from holdfast.training.export.protocol import Place, Source
from holdfast.training.parity.champion import Champion

FOLDER = Path(__file__).parent / "export"
EXPERIMENTS = ("Pictures", "Sequences", "TiedSequences")


def load_neighbour(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@dataclass(frozen=True)
class Exported:
    name: str
    experiment: Any
    champion_path: Path
    source: Source
    place: Place
    champion: Champion


def export(name: str, folder: Path) -> Exported:
    torch.manual_seed(1)
    experiment = getattr(load_neighbour("export_experiments"), name)(Context())
    path = folder / "model.safetensors"
    write_weights(path, experiment.model().state_dict())
    source, place = open_champion(
        experiment, path, ExportConfig(), folder / "bundle", folder / "scratch"
    )
    write_artifacts(source, place, tuple(formats()))
    return Exported(name, experiment, path, source, place, Champion.load(experiment, path, 32))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """All formats of both experiments."""
    return {name: export(name, tmp_path_factory.mktemp(name)) for name in EXPERIMENTS}
