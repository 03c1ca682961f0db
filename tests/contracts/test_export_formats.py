"""What every row of the table of export formats must keep; a new row enters by itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.training.export.formats import formats

NEIGHBOUR = Path(__file__).parents[1] / "training/conftest.py"
ROWS = formats()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = importlib.util.spec_from_file_location("export_fixtures", NEIGHBOUR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.export("Pictures", tmp_path_factory.mktemp("formats"))


def test_every_format_has_a_file_of_its_own() -> None:
    assert len({row.path for row in ROWS.values()}) == len(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_file_is_where_the_row_says(exported: Any, name: str) -> None:
    assert (exported.place.bundle / ROWS[name].path).stat().st_size > 0


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("num_samples", [1, 5])
def test_outputs_have_the_shapes_and_types_of_the_interface(
    exported: Any, name: str, num_samples: int
) -> None:
    images = torch.rand(num_samples, 1, 6, 6) * 10
    outputs = ROWS[name].load(exported.place).run((images,))
    ports = exported.champion.interface.outputs
    assert [tuple(output.shape) for output in outputs] == [
        (num_samples, *port.shape) for port in ports
    ]
    assert [str(output.dtype) for output in outputs] == [f"torch.{port.dtype}" for port in ports]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("hole", [float("nan"), float("inf")])
def test_a_hole_spoils_its_own_sample_alone(exported: Any, name: str, hole: float) -> None:
    artifact = ROWS[name].load(exported.place)
    images = torch.rand(4, 1, 6, 6) * 10
    holed = images.clone()
    holed[2, 0, 3, 3] = hole
    for good, spoiled in zip(artifact.run((images,)), artifact.run((holed,)), strict=True):
        assert bool(spoiled[2].isnan().all())
        torch.testing.assert_close(spoiled[[0, 1, 3]], good[[0, 1, 3]])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.is_exact])
def test_an_exact_format_shows_the_champions_tensors(exported: Any, name: str) -> None:
    tensors = ROWS[name].load(exported.place).tensors()
    for wanted, tensor in exported.champion.tensors.items():
        if tensor.is_floating_point():
            assert torch.equal(tensors[wanted], tensor)
