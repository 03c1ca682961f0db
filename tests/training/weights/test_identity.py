"""Digests of what a run's weights begin with: of contents and names, not of places."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from holdfast.training.configuration.schema import TrainConfig
from holdfast.training.errors import DataNotFoundError
from holdfast.training.weights.identity import weight_files

USUAL = TrainConfig()


class OnThis:
    def __init__(self, *places: Path | str) -> None:
        self._places = places

    def base_files(self) -> Sequence[Path | str]:
        return self._places


def base_digest(*places: Path | str) -> str:
    return weight_files(OnThis(*places), USUAL)["base"]


def test_a_run_that_begins_as_usual_has_none() -> None:
    assert weight_files(object(), USUAL) == {}


def test_a_file_counts_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"base")
    before = base_digest(tmp_path / "one")
    moved = (tmp_path / "one").rename(tmp_path / "two")
    assert base_digest(moved) == before
    moved.write_bytes(b"Base")
    assert base_digest(moved) != before


def test_a_folder_counts_by_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_bytes(b"1")
    (folder / "inner" / "b").write_bytes(b"2")
    digests = {base_digest(folder)}
    (folder / "inner" / "b").rename(folder / "b")
    digests.add(base_digest(folder))
    (folder / "c").touch()
    digests.add(base_digest(folder))
    assert len(digests) == 3
    assert base_digest(folder.rename(tmp_path / "moved")) in digests


def test_a_text_is_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a_base_in_a_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.bin").write_bytes(b"1")
    monkeypatch.syspath_prepend(tmp_path)
    before = base_digest(package.name)
    assert base_digest(package.name) == before  # what importing leaves there does not count
    (package / "weights.bin").write_bytes(b"2")
    assert base_digest(package.name) != before
    del sys.modules[package.name]


@pytest.mark.parametrize("place", [Path("/nowhere/base.bin"), "no_such_package_anywhere"])
def test_what_is_not_there_is_named(place: Path | str) -> None:
    with pytest.raises(DataNotFoundError, match=r"base_files\(\) names .*which is not"):
        base_digest(place)


def test_initial_weights_count_by_the_file_that_holds_them(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    folder = TrainConfig(initial_weights=tmp_path)
    file = TrainConfig(initial_weights=tmp_path / "model.safetensors")
    assert weight_files(object(), folder) == weight_files(object(), file)
    assert weight_files(object(), file).keys() == {"initial_weights"}
