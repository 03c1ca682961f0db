"""The wheel: what is in it, and that it works where nothing else of the project is."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.packaging.wheel import REPOSITORY, build, install, problems, use


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_sources_the_definitions_and_nothing_else(wheel: Path) -> None:
    assert problems(wheel) == []


def test_classifiers_and_bounds_name_the_same_versions_of_python() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    named = [
        int(found[1])
        for text in project["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", text))
    ]
    assert project["requires-python"] == f">=3.{min(named)},<3.{max(named) + 1}"
    assert named == list(range(min(named), max(named) + 1))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_works_in_a_fresh_environment(
    wheel: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    use(install(wheel, tmp_path, sys.executable), tmp_path / "project")
    told = capfd.readouterr().out
    assert str(tmp_path / "environment") in told, "and not from the sources"
    assert "golden outputs are right" in told
