"""What restore does about damage: the checkpoint is named and set aside, the one before is used."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.training.checkpointing.digests import digest_of
from holdfast.training.checkpointing.manifest import DIGEST_KEY
from holdfast.training.errors import CheckpointCorruptError
from holdfast.training.runs.durable_json import json_bytes
from holdfast.training.runs.paths import RunDirectory
from tests.training.checkpointing.checkpoints import (
    assert_holds,
    flip_bit,
    managing,
    names,
    save_steps,
)
from tests.training.far_memory import FarReader


class Exploit:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def truncate(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_weight(folder: Path) -> None:
    flip_bit(folder / "model.safetensors")


def empty(folder: Path) -> None:
    (folder / "state.json").write_bytes(b"")


def lose(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()


def put_folder(folder: Path) -> None:
    (folder / "ema.safetensors").unlink()
    (folder / "ema.safetensors").mkdir()


def put_link(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.rename(folder.parent.parent / "elsewhere")
    path.symlink_to(folder.parent.parent / "elsewhere")


def put_foreign(folder: Path) -> None:
    shutil.copyfile(folder / "ema.safetensors", folder / "model.safetensors")


def put_pickle(folder: Path) -> None:
    exploit = pickle.dumps(Exploit(folder.parent.parent / "exploited"))
    (folder / "model.safetensors").write_bytes(exploit)
    lie(folder, "model.safetensors", exploit)


def add_pickle(folder: Path) -> None:
    (folder / "extra.pkl").write_bytes(pickle.dumps(Exploit(folder.parent.parent / "exploited")))


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def truncate_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:200])


def put_file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def swap_state(folder: Path) -> None:
    (folder / "state.json").write_bytes(b"not json")
    lie(folder, "state.json", b"not json")


def raise_version(folder: Path) -> None:
    edit(folder, format_version=99)


def change_step(folder: Path) -> None:
    edit(folder, step=9)


def unlist_state(folder: Path) -> None:
    fields = json.loads((folder / "manifest.json").read_bytes())
    edit(folder, files={n: e for n, e in fields["files"].items() if n != "state.json"})


def unknown_digest(folder: Path) -> None:
    fields = json.loads((folder / "manifest.json").read_bytes())
    fields["files"]["model.safetensors"]["digest"] = "crc9:00"
    edit(folder, files=fields["files"])


def lie(folder: Path, name: str, content: bytes) -> None:
    fields = json.loads((folder / "manifest.json").read_bytes())
    fields["files"][name] = {"size_bytes": len(content), "digest": digest_of([content])}
    edit(folder, files=fields["files"])


def edit(folder: Path, **changes: object) -> None:
    """Change the manifest as somebody would who knows how its digest is made."""
    path = folder / "manifest.json"
    fields = {**json.loads(path.read_bytes()), **changes}
    del fields[DIGEST_KEY]
    path.write_bytes(json_bytes({**fields, DIGEST_KEY: digest_of([json_bytes(fields)])}))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: r"optimizer\.safetensors has \d+ bytes, the manifest says \d+",
    flip_weight: r"model\.safetensors was changed: the manifest says its digest is blake3:",
    empty: r"state\.json has 0 bytes, the manifest says",
    lose: r"ema\.safetensors is missing",
    put_folder: r"ema\.safetensors should be a plain file and is a folder",
    put_link: r"model\.safetensors should be a plain file and is a link",
    put_foreign: r"model\.safetensors (has \d+ bytes|was changed)",
    put_pickle: r"model\.safetensors is not a safetensors file",
    add_pickle: r"extra\.pkl is not a file of a checkpoint",
    lose_manifest: r"manifest\.json is missing",
    truncate_manifest: r"manifest\.json is not a manifest",
    put_file_for_folder: r"manifest\.json is missing",
    empty_folder: r"manifest\.json is missing",
    swap_state: r"state\.json is not JSON",
    raise_version: r"has format version 99, this Holdfast reads",
    change_step: r"manifest\.json is of step 9, not of 20",
    unlist_state: r"is full and lists no state\.json",
    unknown_digest: r"files\.model\.safetensors\.digest: .* found 'crc9:00'",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "digits" / "a")
    save_steps(run, 10, 20)
    return run


def all_bytes(folder: Path) -> dict[str, bytes]:
    paths = [folder, *folder.rglob("*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file()}


@pytest.mark.parametrize("is_far", [False, True], ids=["memory", "device"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    run: RunDirectory,
    damage: Callable[[Path], None],
    is_far: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    damage(run.checkpoint(20))
    damaged = all_bytes(run.checkpoint(20))
    with managing(run) as manager:
        restored = manager.restore(device=FarReader() if is_far else None)
        assert restored is not None
        assert restored.manifest.step == 10
        assert_holds(restored.tensors, 10)
        assert [info.step for info in manager.checkpoints()] == [10]
    assert names(run.checkpoints) == ["step-00000010", "step-00000020.damaged-1"]
    assert all_bytes(run.checkpoints / "step-00000020.damaged-1") == damaged
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(DAMAGES[damage], record.getMessage())
    assert record.getMessage().endswith(
        "set aside as step-00000020.damaged-1, the checkpoint before it is tried"
    )
    assert not (run.path / "exploited").exists()


def test_with_none_left_nothing_is_deleted_and_each_start_says_so(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    flip_weight(run.checkpoint(10))
    truncate(run.checkpoint(20))
    for _ in range(2):
        with (
            managing(run) as manager,
            pytest.raises(CheckpointCorruptError, match=r"no checkpoint of this run is good any"),
        ):
            manager.restore()
        assert names(run.checkpoints) == ["step-00000010.damaged-1", "step-00000020.damaged-1"]
    told = [record.getMessage() for record in caplog.records]
    assert [text.rpartition(", ")[2] for text in told] == [
        "the checkpoint before it is tried",
        "none is left",
    ]


def test_a_step_can_be_damaged_again(run: RunDirectory) -> None:
    for number in (1, 2, 3):
        flip_weight(run.checkpoint(20))
        with managing(run) as manager:
            manager.restore()
        assert f"step-00000020.damaged-{number}" in names(run.checkpoints)
        save_steps(run, 20)


def test_a_damaged_manifest_does_not_keep_others_from_being_saved_and_pruned(
    run: RunDirectory,
) -> None:
    truncate_manifest(run.checkpoint(10))
    save_steps(run, 30)
    with managing(run) as manager:
        assert [info.step for info in manager.checkpoints()] == [20, 30]
    assert "step-00000010" in names(run.checkpoints)


@pytest.mark.parametrize("name", ["step-20", "step-000000020", "notes.txt", ".DS_Store"])
def test_what_is_not_named_as_a_checkpoint_is_left_alone(run: RunDirectory, name: str) -> None:
    (run.checkpoints / name).mkdir()
    with managing(run) as manager:
        restored = manager.restore()
    assert restored is not None
    assert restored.manifest.step == 20
    assert name in names(run.checkpoints)


def test_hidden_files_of_the_system_do_no_harm(run: RunDirectory) -> None:
    (run.checkpoint(20) / ".nfs0001").write_bytes(b"x")
    with managing(run) as manager:
        restored = manager.restore()
    assert restored is not None
    assert restored.manifest.step == 20
