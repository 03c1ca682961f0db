"""Bundles by name, version and alias; and pulling them, whatever happens on the way."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from training.errors import BundleError, InputError
from training.export import console, consumer
from training.export.pull import pull
from training.export.registry import AliasMove, BundleReference, Registry

CONTENT = {
    "1/model.onnx": b"onnx" * 1000,
    "README.md": b"# card\n",
    "golden/golden.json": b"{}\n",
    "model.safetensors": b"weights" * 5000,
}


def make_bundle(folder: Path, number: int = 0) -> Path:
    """A bundle that verifies; its model does not run, which a registry does not ask for."""
    files: dict[str, Any] = {}
    for name, content in CONTENT.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + bytes([number]))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files[name] = {"sha256": digest, "size_bytes": len(content) + 1}
    manifest: dict[str, Any] = {
        "champion": {"test_metrics": {"loss": 0.25 + number}},
        "files": files,
        "format_version": consumer.FORMAT_VERSION,
        "formats": {
            "onnx": {"path": "1/model.onnx"},
            "weights": {"path": "model.safetensors"},
        },
        "name": "digits",
        "run": {"run_id": f"run-{number}"},
    }
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (folder / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "source")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "store")


def test_publishing_counts_versions_and_knows_a_bundle_again(
    registry: Registry, tmp_path: Path
) -> None:
    bundles = [make_bundle(tmp_path / str(number), number) for number in range(3)]
    assert [registry.publish(bundle) for bundle in bundles] == [("digits", n) for n in (1, 2, 3)]
    assert registry.publish(bundles[1]) == ("digits", 2)
    assert registry.versions("digits") == [1, 2, 3]


def test_publishers_at_the_same_time_get_different_versions(
    registry: Registry, tmp_path: Path
) -> None:
    bundles = [make_bundle(tmp_path / str(number), number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        versions = [version for _, version in pool.map(registry.publish, bundles)]
    assert sorted(versions) == list(range(1, 9))
    assert registry.versions("digits") == list(range(1, 9))


def test_a_spoiled_bundle_is_not_published(registry: Registry, source: Path) -> None:
    (source / "README.md").write_bytes(b"# cars\n\0")
    with pytest.raises(BundleError, match=r"README\.md was altered"):
        registry.publish(source)
    assert registry.versions("digits") == []


def test_an_alias_moves_and_remembers(registry: Registry, tmp_path: Path) -> None:
    for number in range(2):
        registry.publish(make_bundle(tmp_path / str(number), number))
    assert registry.move_alias("digits", "champion", 1, reason="first", after=None)
    first = registry.position("digits", "champion")
    assert registry.move_alias("digits", "champion", 2, reason="better", after=first)
    assert registry.resolve(BundleReference.parse("digits")) == 2
    history = registry.history("digits", "champion")
    assert [(move.version, move.reason) for move in history] == [(1, "first"), (2, "better")]


def test_of_two_movers_from_one_position_one_wins(registry: Registry, tmp_path: Path) -> None:
    for number in range(8):
        registry.publish(make_bundle(tmp_path / str(number), number))

    def move(version: int) -> bool:
        return registry.move_alias("digits", "nightly", version, reason="", after=None)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(move, range(1, 9)))
    assert sum(won) == 1
    assert registry.aliases("digits") == {"nightly": won.index(True) + 1}


@pytest.mark.parametrize("text", ["../x", "a/b", "", "x@../y", "x@a/b", ".hidden"])
def test_a_name_that_could_be_a_path_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no name of a bundle or alias"):
        BundleReference.parse(text)


def test_an_unknown_reference_lists_what_there_is(registry: Registry, source: Path) -> None:
    with pytest.raises(InputError, match=r"no bundle 'digits'; it has: none"):
        registry.resolve(BundleReference.parse("digits"))
    registry.publish(source)
    with pytest.raises(InputError, match=r"no version 7; it has \[1\]"):
        registry.resolve(BundleReference.parse("digits@7"))
    with pytest.raises(InputError, match="no alias 'champion'"):
        registry.resolve(BundleReference.parse("digits"))
    with pytest.raises(InputError, match="no version 3"):
        registry.move_alias("digits", "x", 3, reason="", after=AliasMove(1, 1, "", ""))


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_pull_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pull(source, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(source)
    pull(source, tmp_path / "there")  # again: nothing to do


def test_a_partial_pull_leaves_formats_out_and_still_verifies(source: Path, tmp_path: Path) -> None:
    pull(source, tmp_path / "there", ("onnx",))
    assert not (tmp_path / "there/model.safetensors").exists()
    consumer.verify_files(tmp_path / "there")
    (tmp_path / "there/1/model.onnx").unlink()
    with pytest.raises(consumer.RefusedBundleError, match=r"1/model\.onnx is missing"):
        consumer.verify_files(tmp_path / "there")
    with pytest.raises(InputError, match="no format 'tflite'; it has onnx, weights"):
        pull(source, tmp_path / "other", ("tflite",))


def test_an_interrupted_pull_goes_on_where_it_stood(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"

    def interrupt(name: str, size: int) -> None:
        if name == "README.md":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(source, target, progress=interrupt)
    assert not target.exists()
    half = tmp_path / "there.partial/model.safetensors"
    half.write_bytes((source / "model.safetensors").read_bytes()[:1000])
    inode = (tmp_path / "there.partial/1/model.onnx").stat().st_ino
    pull(source, target)
    assert files_of(target) == files_of(source)
    assert (target / "1/model.onnx").stat().st_ino == inode


def test_a_wrong_half_file_is_copied_again(source: Path, tmp_path: Path) -> None:
    half = tmp_path / "there.partial/model.safetensors"
    half.parent.mkdir()
    half.write_bytes(b"something else")
    (half.parent / "stranger").write_text("of an older bundle")
    pull(source, tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(source)


def alter(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"W" + path.read_bytes()[1:])


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def add(folder: Path) -> None:
    (folder / "golden/extra").write_bytes(b"")


def link(folder: Path) -> None:
    remove(folder)
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def link_folder(folder: Path) -> None:
    shutil.move(folder / "golden", folder.parent / "elsewhere")
    (folder / "golden").symlink_to(folder.parent / "elsewhere")


def escape(folder: Path) -> None:
    manifest = consumer.read_manifest(folder)
    manifest["files"]["../evil"] = manifest["files"]["README.md"]
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (folder / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (alter, r"model\.safetensors was altered"),
        (truncate, r"model\.safetensors was altered"),
        (remove, r"model\.safetensors is missing"),
        (add, "golden/extra is not in the manifest"),
        (link, r"model\.safetensors is a symlink"),
        (link_folder, "golden is a symlink"),
        (escape, r"'\.\./evil', which is not a path in the bundle"),
    ],
)
def test_a_pull_of_a_spoiled_bundle_is_refused_by_name(
    source: Path, tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    spoil(source)
    with pytest.raises(BundleError, match=named):
        pull(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_folder_with_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a good bundle"):
        pull(source, tmp_path / "there")
    assert (tmp_path / "there/mine.txt").read_text() == "precious"


def test_the_commands_tell_what_there_is_and_pull_it(
    registry: Registry, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.publish(source)
    registry.move_alias("digits", "champion", 1, reason="the first of its name", after=None)
    store = str(tmp_path / "store")
    assert console.main(["bundles", "--store", store]) == 0
    assert "digits@1" in (line := capsys.readouterr().out)
    assert "loss=0.25  @champion" in line
    there = str(tmp_path / "there")
    assert console.main(["pull", "digits", "--store", store, "--to", there]) == 0
    assert "every digest is right" in capsys.readouterr().out
    assert console.main(["pull", "digits@9", "--store", store, "--to", f"{there}2"]) == 2
    assert "no version 9" in capsys.readouterr().err


def test_the_commands_need_neither_torch_nor_click() -> None:
    code = "import sys, training.export.console; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "click", "pydantic", "onnx", "numpy", "prefect"})
