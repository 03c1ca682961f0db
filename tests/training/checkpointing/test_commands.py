"""``checkpoints list|verify|diff`` on checkpoints that a real training made."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from holdfast.training.checkpointing.commands import checkpoints
from holdfast.training.checkpointing.inspection import verify_all
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import Training
from tests.training.checkpointing.checkpoints import IDENTITY, contents_at, managing, save_steps
from tests.training.checkpointing.test_damage import (
    DAMAGES,
    add_pickle,
    edit,
    flip_weight,
    lose,
    put_folder,
    truncate,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs ``one`` and ``other``, which differ by the seed."""
    folder = tmp_path_factory.mktemp("store")
    short = ("train.num_epochs=3", "checkpoint.keep_last=1", "selection.top_k=1")
    trainings = [
        Training(folder, "one", overrides=short),
        Training(folder, "other", overrides=(*short, "seed=1")),
    ]
    for segment in [training.start() for training in trainings]:
        assert segment.finish() == 0, segment.errors
    return trainings[0].run.path.parent


@pytest.fixture
def run(store: Path, tmp_path: Path) -> RunDirectory:
    """A copy of the run ``one`` that may be damaged."""
    return RunDirectory(shutil.copytree(store / "one", tmp_path / "one"))


@pytest.fixture
def small(tmp_path: Path) -> RunDirectory:
    """A run with the checkpoints 10 and 20, made without training."""
    run = RunDirectory(tmp_path / "small" / "a")
    save_steps(run, 10, 20)
    return run


def call(*arguments: object) -> Result:
    return CliRunner().invoke(checkpoints, [str(argument) for argument in arguments])


def json_of(*arguments: object) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


def newest(run: RunDirectory) -> Path:
    [path] = [Path(row["path"]) for row in json_of("list", run.path) if row["is_latest"]]
    return path


def save_other(run: RunDirectory, model: dict[str, Tensor], **identity: Any) -> Path:
    """Step 10 with this model; everything else as in ``contents_at``."""
    with managing(run, **identity) as manager:
        contents = contents_at(10)
        tensors = {**contents.tensors, "model": model}
        manager.save(replace(contents, tensors=tensors), wait=True)
    return run.checkpoint(10)


def test_list_shows_each_checkpoint_and_which_is_the_latest(run: RunDirectory) -> None:
    rows = json_of("list", run.path)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {row["kind"] for row in rows} <= {"full", "weights"}
    latest = rows[-1]
    assert (latest["is_latest"], latest["kind"], latest["epoch"]) == (True, "full", 3)
    assert latest["metrics"].keys() == {"loss", "accuracy"}
    shown = call("list", run.path).stdout.splitlines()
    assert shown[0].split() == ["step", "epoch", "kind", "MiB", "created", "metrics", "state"]
    assert len(shown) == 1 + len(rows)
    assert shown[-1].endswith("latest")
    assert f"accuracy {latest['metrics']['accuracy']:.4g}" in shown[-1]


def test_a_checkpoint_and_a_checkpoints_folder_can_be_named_too(run: RunDirectory) -> None:
    assert json_of("list", run.checkpoints) == json_of("list", run.path)
    [row] = json_of("list", newest(run))
    assert row["path"] == str(newest(run))


def test_the_folder_one_stands_in_can_be_named(
    small: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small.checkpoint(20))
    assert call("verify", ".").stdout.startswith("good       step-00000020  full")


def test_what_was_set_aside_is_shown_and_is_no_fault_of_the_run(small: RunDirectory) -> None:
    flip_weight(small.checkpoint(20))
    with managing(small) as manager:
        manager.restore()
    rows = json_of("list", small.path)
    assert [(row["step"], row["condition"], row["is_latest"]) for row in rows] == [
        (10, "good", True),
        (20, "set aside", False),
    ]
    verified = call("verify", small.path)
    assert verified.exit_code == 0
    assert "set aside  step-00000020.damaged-1" in verified.stdout
    assert "model.safetensors was changed" in verified.stdout
    assert "set aside: step-00000020.damaged-1" in call("list", small.path).stdout


def test_list_shows_a_file_for_which_a_resume_would_refuse_all(small: RunDirectory) -> None:
    (small.checkpoint(20) / "notes.txt").write_text("good run")
    rows = json_of("list", small.path)
    assert [row["condition"] for row in rows] == ["good", "damaged"]
    assert [row["is_latest"] for row in rows] == [True, False]
    assert "notes.txt is not a file of a checkpoint" in call("list", small.path).stdout


def test_a_run_without_checkpoints_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    for command in ("list", "verify"):
        told = call(command, tmp_path)
        assert (told.exit_code, "no checkpoints yet" in told.stdout) == (0, True)


def test_metrics_that_are_no_numbers_are_still_json(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "a")
    with managing(run) as manager:
        manager.save(contents_at(10, loss=math.nan), wait=True)
    [row] = json_of("list", run.path)
    assert row["metrics"] == {"loss": "nan"}


def test_verify_finds_a_real_run_good(run: RunDirectory) -> None:
    verified = call("verify", run.path)
    assert verified.exit_code == 0
    lines = verified.stdout.splitlines()
    assert len(lines) == len(json_of("list", run.path))
    assert all(line.startswith("good ") for line in lines)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_verify_names_the_file_and_what_was_expected(
    small: RunDirectory, damage: Callable[[Path], None]
) -> None:
    damage(small.checkpoint(20))
    verified = call("verify", small.path)
    assert verified.exit_code == 1
    good, damaged = verified.stdout.splitlines()
    assert good.startswith("good       step-00000010")
    assert damaged.startswith("damaged    step-00000020")
    first, second = json_of("verify", small.path)
    assert (first["problem"], first["condition"]) == (None, "good")
    assert re.search(DAMAGES[damage], second["problem"])
    assert second["problem"] in damaged
    assert call("verify", small.checkpoint(20)).exit_code == 1
    assert not (small.path / "exploited").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_unreadable_rather_than_damaged(
    small: RunDirectory,
) -> None:
    (small.checkpoint(20) / "model.safetensors").chmod(0)
    verified = call("verify", small.path)
    assert verified.exit_code == 1
    assert "unreadable step-00000020" in verified.stdout


def test_verify_looks_again_at_what_is_slimmed_meanwhile(
    small: RunDirectory, tmp_path: Path
) -> None:
    folder = small.checkpoint(20)
    slim = shutil.copytree(folder, tmp_path / "slim")
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    kept = {name: files[name] for name in ("model.safetensors", "ema.safetensors")}
    edit(slim, kind="weights", files=kept)
    is_slimmed = False

    def slim_once(_: int) -> None:
        """As a training that goes on would: first the manifest, then the files."""
        nonlocal is_slimmed
        if not is_slimmed:
            is_slimmed = True
            (slim / "manifest.json").rename(folder / "manifest.json")
            (folder / "optimizer.safetensors").unlink()

    [seen] = verify_all([folder], slim_once)
    assert seen.condition == "good"
    assert seen.manifest is not None
    assert seen.manifest.kind == "weights"


def test_verify_does_not_miss_what_is_pruned_meanwhile(small: RunDirectory) -> None:
    def prune(_: int) -> None:
        shutil.rmtree(small.checkpoint(20), ignore_errors=True)

    assert list(verify_all([small.checkpoint(20)], prune)) == []


def test_equal_checkpoints_are_equal_whoever_saved_them_and_when(
    run: RunDirectory, store: Path
) -> None:
    edit(newest(run), created_at="1999-01-01T00:00:00Z", segment=7)
    told = call("diff", run.path, store / "one")
    assert told.exit_code == 0, told.stdout
    assert told.stdout.startswith("equal: ")
    assert "tensors (model " in told.stdout
    assert json_of("diff", run.path, store / "one")["is_equal"] is True


def test_two_seeds_differ_in_what_they_should(store: Path) -> None:
    one, other = store / "one", store / "other"
    told = call("diff", one, other)
    assert told.exit_code == 1
    found = json_of("diff", one, other)["differences"]
    names: dict[str, set[str]] = {}
    for difference in found:
        names.setdefault(difference["section"], set()).add(difference["name"])
        assert f"  {difference['name']}: " in told.stdout
    assert {"model", "optimizer", "ema", "generators", "history", "metrics"} <= names.keys()
    assert names["config"] == {"seed"}
    assert "versions" not in names
    assert "seed: 0 in A, 1 in B, by 1" in told.stdout
    assert "0.weight" in names["model"]
    assert "0.weight/exp_avg" in names["optimizer"]
    assert "torch.cpu" in names["generators"]
    assert "0.train_loss" in names["history"]


def test_a_flipped_bit_is_found_in_its_tensor(run: RunDirectory, store: Path) -> None:
    flip_weight(newest(run))
    [difference] = json_of("diff", run.path, store / "one")["differences"]
    assert difference["section"] == "model"
    assert difference["num_differing"] == 1


def test_counters_scheduler_and_history_of_two_steps_are_told(small: RunDirectory) -> None:
    told = call("diff", small.checkpoint(10), small.checkpoint(20))
    assert told.exit_code == 1
    assert "step: 10 in A, 20 in B, by 10" in told.stdout
    assert "layer.weight: 1999 of 2000 elements differ, by at most 19990" in told.stdout


def test_versions_and_device_are_listed(small: RunDirectory, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path / "b")
    with managing(other, versions={**IDENTITY.versions, "numpy": "2"}, device="cuda") as manager:
        manager.save(contents_at(20), wait=True)
    told = call("diff", small.path, other.path)
    assert told.exit_code == 1
    lines = told.stdout.splitlines()
    assert lines[2:5] == [
        "versions: 2 differ",
        '  device: "cpu x86_64" in A, "cuda" in B',
        "  numpy: only in B",
    ]


def test_other_shapes_types_and_names_are_said(small: RunDirectory, tmp_path: Path) -> None:
    weight = contents_at(10).tensors["model"]["layer.weight"]
    other = {"layer.weight": weight.double(), "layer.bias": torch.zeros(49), "more": torch.ones(1)}
    told = call("diff", small.checkpoint(10), save_other(RunDirectory(tmp_path / "b"), other))
    assert 'layer.weight: "F32 [40, 50]" in A, "F64 [40, 50]" in B' in told.stdout
    assert 'layer.bias: "F32 [50]" in A, "F32 [49]" in B' in told.stdout
    assert "more: only in B" in told.stdout
    assert "differences: 3;" in told.stdout


def test_tied_tensors_are_compared_under_each_name(tmp_path: Path) -> None:
    tied = torch.ones(3)
    runs = [RunDirectory(tmp_path / name) for name in "ab"]
    first = save_other(runs[0], {"one": tied, "two": tied})
    second = save_other(runs[1], {"one": tied, "two": tied.clone()})
    assert json_of("diff", first, second)["num_tensors"]["model"] == 2
    assert call("diff", first, second).exit_code == 0


def test_of_weights_what_both_have_is_compared(run: RunDirectory) -> None:
    rows = json_of("list", run.path)
    [slim, *_] = [Path(row["path"]) for row in rows if row["kind"] == "weights"]
    told = call("diff", slim, newest(run))
    assert "not compared, as of kind weights: optimizer.safetensors, state.json" in told.stdout
    assert "generators" not in told.stdout
    full = newest(run)
    copied = shutil.copytree(full, run.path / "copy")
    files = json.loads((copied / "manifest.json").read_bytes())["files"]
    kept = {name: files[name] for name in ("model.safetensors", "ema.safetensors")}
    edit(copied, kind="weights", files=kept)
    assert call("diff", copied, full).exit_code == 0
    assert call("diff", full, copied).stdout.startswith("equal: ")


@pytest.mark.parametrize("damage", [truncate, lose, put_folder])
def test_a_file_that_cannot_be_compared_is_bad_input(
    small: RunDirectory, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    whole = shutil.copytree(small.checkpoint(20), tmp_path / "whole")
    damage(small.checkpoint(20))
    told = call("diff", whole, small.checkpoint(20))
    assert (told.exit_code, told.stdout) == (2, "")
    [line] = told.stderr.splitlines()
    assert line.startswith(f"error: {small.checkpoint(20)}")


def test_a_pickle_beside_or_instead_of_tensors_is_never_loaded(
    small: RunDirectory, tmp_path: Path
) -> None:
    whole = shutil.copytree(small.checkpoint(20), tmp_path / "whole")
    add_pickle(small.checkpoint(20))
    assert call("diff", whole, small.checkpoint(20)).exit_code == 0
    [put_pickle] = [damage for damage in DAMAGES if damage.__name__ == "put_pickle"]
    put_pickle(small.checkpoint(20))
    told = call("diff", whole, small.checkpoint(20))
    assert told.exit_code == 2
    assert "is not a safetensors file" in told.stderr
    assert not (small.path / "exploited").exists()


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("nothing", "does not exist; expected a run"),
        ("file", "is a file; expected a run"),
        ("folder", "holds notes.txt; expected a run"),
    ],
)
def test_what_is_no_checkpoint_is_one_clear_line(place: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    for arguments in (["list"], ["verify"], ["diff", tmp_path / place]):
        told = call(*arguments, tmp_path / place)
        assert (told.exit_code, told.stdout) == (2, "")
        [line] = told.stderr.splitlines()
        assert part in line


def test_a_run_without_any_good_checkpoint_cannot_be_compared(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    told = call("diff", tmp_path, tmp_path)
    assert told.exit_code == 2
    assert "has no checkpoint that can be read" in told.stderr


def test_help_teaches_by_examples_and_loads_no_torch() -> None:
    script = (
        "import sys; from holdfast.training.command_line import main; "
        "main(['checkpoints', *sys.argv[1:], '--help'], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    for name in ("list", "verify", "diff"):
        done = subprocess.run(
            [sys.executable, "-c", script, name], capture_output=True, text=True, check=True
        )
        assert f"python -m holdfast.training checkpoints {name}" in done.stdout
        assert done.stdout.splitlines()[-1] == "False"


def test_holdfast_finds_the_run_and_forwards(store: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "holdfast",
            "checkpoints",
            "diff",
            "one",
            f"{store.name}/other",
            "--json",
        ],
        env={**os.environ, "HOLDFAST_STORE": str(store.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["is_equal"] is False
