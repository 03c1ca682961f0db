"""Frozen parameters that are left out of all that is saved: digest, watch, merge, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from holdfast.training.checkpointing.manifest import MANIFEST_NAME, read_manifest, verify
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.adapters import network
from tests.generality.harness import OFTEN, QUICK_EXPORT, assert_exact, assert_published

EXPERIMENTS = Path(__file__).with_name("adapters.py")
SHORT = (*QUICK_EXPORT, "train.num_epochs=2", "selection.candidates=[]")
TRAINED = {"0.down", "0.up", "2.down", "2.up"}


def reference(name: str) -> str:
    return f"{EXPERIMENTS}:{name}"


def newest(run: RunDirectory) -> Path:
    return max(run.checkpoints.glob("step-*"))


def names_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def refusal(training: Training, stage: str = "segment") -> str:
    """The one line of a stage that must refuse."""
    segment = training.start(stage=stage)
    code = segment.finish()
    assert code == 2, f"exit code {code}\n{''.join(segment.errors)}"
    lines = [line for line in segment.errors if line.startswith("error: ")]
    assert len(lines) == 1, segment.errors
    return lines[0]


def write_base(path: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    save_file(network().state_dict(), path)
    return path


@pytest.mark.slow
def test_adapters_alone_are_saved_and_a_bundle_holds_the_whole_model(tmp_path: Path) -> None:
    run = assert_exact(reference("Lora"), tmp_path)
    saved = newest(run)
    assert names_in(saved / "model.safetensors") == TRAINED
    averaged = names_in(saved / "ema.safetensors")
    assert {name.partition("/")[2] for name in averaged} == TRAINED
    assert json.loads((saved / "state.json").read_text())["frozen"]["num_parameters"] == 4
    assert verify(saved).kind == "full"
    kept = Training(tmp_path, "kept", reference("KeptLora"), OFTEN)
    complete(kept)
    with_base = newest(kept.run) / "model.safetensors"
    lean, whole = (load_file(path) for path in (saved / "model.safetensors", with_base))
    assert all(torch.equal(lean[name], whole[name]) for name in TRAINED)
    calm = Training(tmp_path / "calm", "one", reference("Lora"), QUICK_EXPORT)
    bundle = assert_published(calm).bundle
    names = TRAINED | {f"{i}.base.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert names_in(bundle / "model.safetensors") == names == whole.keys()


@pytest.mark.slow
def test_a_merged_model_is_exported_with_the_answers_of_the_trained_one(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", reference("MergedLora"), SHORT)
    segment = training.start({"HOLDFAST_REHEARSAL_DEPTH": "export"})
    assert segment.finish() == 0, "".join(segment.errors)
    assert [event["num_findings"] for event in segment.events if event["event"] == "rehearsal"] == [
        0
    ]
    bundle = assert_published(training).bundle
    assert names_in(bundle / "model.safetensors") == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.slow
def test_a_merge_that_changes_the_answers_is_not_published(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", reference("WronglyMergedLora"), SHORT)
    complete(training)
    for stage in ("candidates", "evaluate"):
        assert training.start(stage=stage).finish() == 0
    segment = training.start(stage="export")
    assert segment.finish() == 1
    assert "the exports are not the champion, nothing was published" in segment.errors[-1]
    assert not training.run.bundle.exists()


@pytest.mark.slow
def test_another_base_under_the_same_run_id_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", 1)
    told = (f"experiment.base={base}", "train.max_steps=9")
    training = Training(tmp_path, "one", reference("FileLora"), told)
    complete(training)
    assert json.loads(training.run.run_json.read_text())["weight_files"].keys() == {"base"}
    write_base(base, 2)
    for stage in ("segment", "candidates"):
        message = refusal(training, stage)
        assert "weight_files.base: 'sha256:" in message
        assert "take another run id" in message


def test_other_frozen_bytes_are_refused_where_no_file_is_named(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", reference("Lora"), ("train.max_steps=9",))
    complete(training)
    record = json.loads(training.run.run_json.read_text())
    record["seeds"]["model"] += 1  # as if another version of torch drew other numbers
    training.run.run_json.write_text(json.dumps(record))
    assert "frozen parameters of Sequential are not those" in refusal(training)
    assert "frozen parameters of Sequential are not those" in refusal(training, "candidates")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("OpenlyChanged", "0.base.weight of Sequential is frozen, was left out of the "
         "checkpoints, and was changed in step 7"),
        ("SilentlyChanged", "was changed before step 12 ended"),
        ("Unfreezing", "2.base.weight of Sequential was unfrozen before or in step 7"),
        ("NothingFrozen", "has no frozen parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_left_out_is_refused_in_one_line(
    name: str, told: str, tmp_path: Path
) -> None:
    overrides = ("data.batch_size=8", "train.num_epochs=2", *OFTEN)
    message = refusal(Training(tmp_path, "one", reference(name), overrides))
    assert told in message
    assert "checkpoint.frozen" in message


@pytest.mark.slow
def test_the_last_validation_is_repeated_with_the_base(tmp_path: Path) -> None:
    often = ("train.num_epochs=3", "checkpoint.every_steps=4", "checkpoint.keep_last=3")
    training = Training(tmp_path, "one", reference("Lora"), (*often, "checkpoint.is_auto=false"))
    complete(training)
    wanted = final_state(training.run)
    training.run.checkpoint(18).rename(tmp_path / "gone")
    manifest = read_manifest(training.run.checkpoint(16))
    other = manifest.model_copy(update={"versions": {**manifest.versions, "torch": "1.0"}})
    (training.run.checkpoint(16) / MANIFEST_NAME).write_bytes(other.to_bytes())
    told = "".join(complete(training).errors)
    assert "the validation of step 12 was repeated on this machine" in told
    assert differences(final_state(training.run), wanted) == []


@pytest.mark.slow
def test_a_layer_may_be_unfrozen_where_it_is_kept(tmp_path: Path) -> None:
    assert_exact(reference("KeptUnfreezing"), tmp_path)
