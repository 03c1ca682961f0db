"""Bundles by name, version and alias; and pulling them, whatever happens on the way."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from holdfast.flows.command_line.group import exit_code_of
from holdfast.training.bundles import console, consumer
from holdfast.training.bundles.pull import pull
from holdfast.training.bundles.registry import AliasMove, BundleReference, Registry
from holdfast.training.bundles.sources import FolderSource
from holdfast.training.errors import BundleError, DataFormatError, InputError, StorageError
from tests.training.bundles.small_bundle import files_of, make_bundle


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


def test_a_bundle_that_was_only_measured_again_keeps_its_version(
    registry: Registry, source: Path
) -> None:
    assert registry.publish(source) == ("digits", 1)
    manifest = {**consumer.read_manifest(source), "measured": {"export_s": 2.5}}
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    (source / "manifest.json").write_bytes(consumer.canonical_bytes(manifest))
    assert registry.publish(source) == ("digits", 1)


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


def test_an_alias_is_moved_by_hand_and_back(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        registry.publish(make_bundle(tmp_path / str(number), number))
    store = str(tmp_path / "store")
    for version in ("2", "1"):
        assert exit_code_of(["alias", f"digits@{version}", "champion", "--store", store]) == 0
    words = ["alias", "digits@champion", "staging", "--reason", "try it", "--store", store]
    assert exit_code_of(words) == 0
    assert "digits@staging is version 1" in capsys.readouterr().out
    assert registry.aliases("digits") == {"champion": 1, "staging": 1}
    assert [move.version for move in registry.history("digits", "champion")] == [2, 1]
    assert exit_code_of(["alias", "digits@9", "champion", "--store", store]) == 2
    assert exit_code_of(["alias", "digits@1", "7", "--store", store]) == 2
    assert "would be taken for a version" in capsys.readouterr().err


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


def test_a_pull_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pull(FolderSource(source), tmp_path / "there")
    assert files_of(tmp_path / "there") == files_of(source)
    pull(FolderSource(source), tmp_path / "there")  # again: nothing to do


def test_a_partial_pull_leaves_formats_out_and_still_verifies(source: Path, tmp_path: Path) -> None:
    pull(FolderSource(source), tmp_path / "there", ("onnx",))
    assert not (tmp_path / "there/model.safetensors").exists()
    consumer.verify_files(tmp_path / "there")
    (tmp_path / "there/1/model.onnx").unlink()
    with pytest.raises(consumer.RefusedBundleError, match=r"1/model\.onnx is missing"):
        consumer.verify_files(tmp_path / "there")
    with pytest.raises(InputError, match="no format 'tflite'; it has onnx, weights"):
        pull(FolderSource(source), tmp_path / "other", ("tflite",))


def test_an_interrupted_pull_goes_on_where_it_stood(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"

    def interrupt(name: str, size: int) -> None:
        if name == "README.md":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(FolderSource(source), target, progress=interrupt)
    assert not target.exists()
    half = tmp_path / "there.partial/bundle/model.safetensors"
    half.write_bytes((source / "model.safetensors").read_bytes()[:1000])
    inode = (tmp_path / "there.partial/bundle/1/model.onnx").stat().st_ino
    pull(FolderSource(source), target)
    assert files_of(target) == files_of(source)
    assert (target / "1/model.onnx").stat().st_ino == inode


def test_a_wrong_half_file_is_copied_again(source: Path, tmp_path: Path) -> None:
    half = tmp_path / "there.partial/bundle/model.safetensors"
    half.parent.mkdir(parents=True)
    (tmp_path / "there.partial/holdfast-pull").touch()
    half.write_bytes(b"something else")
    (half.parent / "stranger").write_text("of an older bundle")
    pull(FolderSource(source), tmp_path / "there")
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
        pull(FolderSource(source), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_folder_with_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and is not a good bundle"):
        pull(FolderSource(source), tmp_path / "there")
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


def test_an_alias_that_stands_there_already_does_not_move(registry: Registry, source: Path) -> None:
    registry.publish(source)
    for reason in ("by hand", "again"):
        registry.point_alias("digits", "staging", 1, reason)
    assert [move.reason for move in registry.history("digits", "staging")] == ["by hand"]


def test_a_bundle_is_pulled_into_an_empty_folder(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "empty"
    target.mkdir()
    pull(FolderSource(source), target)
    assert files_of(target) == files_of(source)


def test_an_altered_version_hides_no_other_and_takes_no_alias(
    registry: Registry, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry.publish(source)
    registry.publish(make_bundle(tmp_path / "second", 1))
    path = registry.bundle("digits", 2) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"run-1", b"run-7"))
    assert console.main(["bundles", "--store", str(tmp_path / "store")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "loss=0.25" in first
    assert "digits@2    unreadable: manifest.json was altered" in second
    with pytest.raises(BundleError, match="was altered"):
        registry.point_alias("digits", "champion", 2, "by hand")
    assert registry.aliases("digits") == {}


def test_a_position_of_an_alias_that_is_none_is_named(registry: Registry, source: Path) -> None:
    registry.publish(source)
    registry.point_alias("digits", "champion", 1, "by hand")
    path = registry.folder / "digits/aliases/champion/000001.json"
    path.write_text('{"version": 7}')
    with pytest.raises(DataFormatError, match=r"000001\.json is no position of an alias"):
        registry.aliases("digits")


def test_the_commands_need_neither_torch_nor_click() -> None:
    code = "import sys, holdfast.training.bundles.console; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "click", "pydantic", "onnx", "numpy", "prefect"})


def test_a_partial_pull_is_not_published(registry: Registry, source: Path, tmp_path: Path) -> None:
    pull(FolderSource(source), tmp_path / "there", ("onnx",))
    with pytest.raises(BundleError, match=r"pulled\.json is not in the manifest"):
        registry.publish(tmp_path / "there")


@pytest.mark.parametrize(
    ("section", "value", "named"),
    [
        ("files", {"README.md": {"sha256": "0" * 64, "size_bytes": "9"}}, "README.md has"),
        ("files", {"README.md": {"sha256": "12", "size_bytes": 9}}, "README.md has"),
        ("files", {"pulled.json": {"sha256": "0" * 64, "size_bytes": 9}}, "'pulled.json', which"),
        ("files", ["README.md"], "does not describe a bundle"),
        ("formats", {"onnx": {"path": "elsewhere.onnx"}}, "there is no elsewhere.onnx"),
        ("formats", None, "does not describe a bundle"),
    ],
)
def test_a_manifest_that_describes_no_bundle_is_refused(
    source: Path, section: str, value: object, named: str
) -> None:
    manifest = {**consumer.read_manifest(source), section: value}
    manifest["manifest_digest"] = consumer.manifest_digest(manifest)
    with pytest.raises(consumer.RefusedBundleError, match=named):
        consumer.parse_manifest(consumer.canonical_bytes(manifest))


def test_two_pulls_do_not_write_into_one_folder(source: Path, tmp_path: Path) -> None:
    def pull_once_more(name: str, size: int) -> None:
        with pytest.raises(InputError, match=r"another pull writes .*there\.partial now"):
            pull(FolderSource(source), tmp_path / "there")

    pull(FolderSource(source), tmp_path / "there", progress=pull_once_more)
    assert files_of(tmp_path / "there") == files_of(source)


def test_a_target_that_cannot_be_written_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/there\.partial"):
        pull(FolderSource(source), tmp_path / "file/there")
