"""Other beginnings: given weights, forks of any full checkpoint, and scores of single ones."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.training.checkpointing.manifest import read_manifest
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.runs.directory import read_run_record, run_identity
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import Training, complete, differences, final_state
from tests.generality.harness import OFTEN, stop_after
from tests.warm_start import WarmProcess

pytestmark = pytest.mark.slow

EXPERIMENT = f"{Path(__file__).with_name('adapters.py')}:KeptLora"
LEAN = EXPERIMENT.replace("KeptLora", "Lora")
KEPT = (*OFTEN, "checkpoint.keep_every_steps=9", "selection.top_k=2")
RESUME = ("--resume",)
FORKED_AT = 27  # in the middle of an epoch of six steps


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command of ``python -m holdfast.training``."""
    process = WarmProcess(arguments, child_environment(1))
    with process.stdout, process.stderr:
        output, errors = process.stdout.read(), process.stderr.read()
    return process.wait(timeout=60), output, errors


def named(training: Training) -> list[str]:
    return ["--experiment", training.experiment, "--store", str(training.store), "--run-id",
            training.run_id]  # fmt: skip


def fork(training: Training, at: object, new_id: str, *more: str) -> tuple[int, str, str]:
    return call("fork", *named(training), "--at", str(at), "--new-run-id", new_id, *more)


def resumed(training: Training, run_id: str) -> Training:
    """A run that takes all but how often it tells from its ``run.json``."""
    return Training(training.store, run_id, training.experiment, OFTEN)


def final_tensors(run: RunDirectory) -> dict[str, bytes]:
    """All files of the last checkpoint but its manifest."""
    return {k: v for k, v in final_state(run).items() if not k.startswith("selectable")}


def go_on(training: Training) -> None:
    segment = training.start(arguments=RESUME)
    assert segment.finish() == 0, "".join(segment.errors)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A finished run with an archive; its tests leave it as it is."""
    training = Training(tmp_path_factory.mktemp("store"), "parent", EXPERIMENT, KEPT)
    complete(training)
    return training


@pytest.fixture(autouse=True)
def _nothing_hidden_is_left(parent: Training) -> Iterator[None]:
    yield
    assert [path.name for path in parent.run.path.parent.glob(".*")] == []


def test_a_fork_goes_on_to_the_bytes_of_its_parent_also_when_it_is_killed(
    parent: Training,
) -> None:
    code, output, errors = fork(parent, FORKED_AT, "child", "--json")
    assert code == 0, errors
    there, child = read_run_record(parent.run), resumed(parent, "child")
    record = read_run_record(child.run)
    assert json.loads(output)["step"] == FORKED_AT
    assert record.lineage is not None
    assert record.lineage.run == run_identity(there)
    assert record.lineage.changed == {}
    assert record.config == there.config
    manifest = read_manifest(child.run.checkpoint(FORKED_AT))
    assert manifest.run == run_identity(record)
    stop_after(child, signal.SIGKILL, 33, RESUME)
    stop_after(child, signal.SIGTERM, 42, RESUME)
    go_on(child)
    assert differences(final_tensors(parent.run), final_tensors(child.run)) == []
    for stage in ("candidates", "evaluate", "report"):
        assert child.start(stage=stage, arguments=RESUME).finish() == 0
    assert f"step {FORKED_AT} of parent" in child.run.report_html.read_text()


def test_a_fork_with_other_keys_is_exact_too(parent: Training) -> None:
    changed = ("--set", "seed=5", "--set", "train.num_epochs=9", "--set", "data.batch_size=12")
    ends = []
    for run_id, stops in (("calm", ()), ("killed", (36, 45))):
        code, _, errors = fork(parent, FORKED_AT, run_id, *changed)
        assert code == 0, errors
        child = resumed(parent, run_id)
        for step in stops:
            stop_after(child, signal.SIGKILL, step, RESUME)
        go_on(child)
        ends.append(final_tensors(child.run))
    assert differences(*ends) == []
    record = read_run_record(child.run)
    assert record.lineage is not None
    assert record.lineage.changed == {"data.batch_size": 12, "seed": 5, "train.num_epochs": 9}
    assert record.seeds != read_run_record(parent.run).seeds


def test_new_rates_begin_with_the_fork_and_the_moments_are_kept(parent: Training) -> None:
    cosine = ("scheduler.name=CosineAnnealingLR", "scheduler.args={T_max=10}",
              "scheduler.interval=step", "optimizer.args.lr=0.5", "warmup.num_steps=2",
              "optimizer.args.weight_decay=0.25")  # fmt: skip
    ends = []
    for run_id, stops in (("rates", ()), ("rates-killed", (29, 33))):
        code, _, errors = fork(
            parent, FORKED_AT, run_id, *(w for c in cosine for w in ("--set", c))
        )
        assert code == 0, errors
        child = resumed(parent, run_id)
        for step in stops:
            stop_after(child, signal.SIGKILL, step, RESUME)
        go_on(child)
        ends.append(final_tensors(child.run))
    assert differences(*ends) == []
    state = json.loads(ends[0]["state.json"])
    [group] = state["optimizer"]["groups"]
    assert group["options"]["weight_decay"] == 0.25
    points = state["scheduler"]["trace"]["points"]
    assert points[:3] == [[0, pytest.approx(0.05)], [1, pytest.approx(0.275)], [2, 0.5]]
    assert state["scheduler"]["num_steps"] == 72 - FORKED_AT
    moments = load_file(child.run.checkpoint(72) / "optimizer.safetensors")
    assert moments["0.up/step"].item() == 72


def test_one_option_changes_alone(parent: Training) -> None:
    code, _, errors = fork(parent, 63, "decayed", "--set", "optimizer.args.weight_decay=0.25")
    assert code == 0, errors
    child = resumed(parent, "decayed")
    go_on(child)
    state = json.loads(final_tensors(child.run)["state.json"])
    assert state["optimizer"]["groups"][0]["options"]["weight_decay"] == 0.25
    assert state["scheduler"]["num_steps"] == 72


def test_the_best_checkpoint_is_forked_where_it_is_full(parent: Training) -> None:
    best = min(
        (read_manifest(path) for path in parent.run.checkpoints.glob("step-*")),
        key=lambda manifest: manifest.metrics.get("loss", float("inf")),
    )
    code, output, errors = fork(parent, "best", "from-best")
    assert (code, best.kind) == (0, "full"), errors
    assert f"begins with step {best.step} of parent" in output


@pytest.mark.parametrize(
    ("at", "more", "told"),
    [
        (10, (), "has no checkpoint of step 10; there are those of 27 (full), 36 (full), 45"),
        ("newest", (), "'newest' is no checkpoint: name a step, as 420, or 'best'"),
        (27, ("--set", "optimizer.name=SGD"), "optimizer.name cannot change in a fork"),
        (27, ("--set", "ema.decays=[]"), "ema.decays cannot change in a fork"),
        (27, ("--set", "train.epochs=5"), "train.epochs"),
    ],
)
def test_what_cannot_be_forked_is_refused_in_one_line(
    at: object, more: tuple[str, ...], told: str, parent: Training
) -> None:
    code, output, errors = fork(parent, at, "refused", *more)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert told in errors
    assert not (parent.run.path.parent / "refused").exists()


def test_a_damaged_checkpoint_is_not_forked(parent: Training) -> None:
    copied = parent.run.path.with_name("damaged")
    shutil.copytree(parent.run.path, copied)
    file = RunDirectory(copied).checkpoint(FORKED_AT) / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    damaged = resumed(parent, "damaged")
    code, _, errors = fork(damaged, FORKED_AT, "refused")
    assert (code, errors.count("\n")) == (1, 1)
    assert "optimizer.safetensors was changed: the manifest says" in errors
    assert not copied.with_name("refused").exists()


def test_a_fork_replaces_no_run(parent: Training) -> None:
    code, _, errors = fork(parent, 27, "parent")
    assert code == 2
    assert "is there already: take another id" in errors


def test_weights_alone_point_to_a_new_run_which_they_begin(tmp_path: Path) -> None:
    training = Training(tmp_path, "one", EXPERIMENT, ("train.num_epochs=6",))
    complete(training)
    slim = next(
        path for path in training.run.checkpoints.iterdir() if read_manifest(path).kind == "weights"
    )
    step = read_manifest(slim).step
    code, _, errors = fork(training, step, "forked")
    assert code == 2
    assert f"--set train.initial_weights={slim}" in errors
    told = (f"train.initial_weights={slim}", "train.max_steps=1", "optimizer.args.lr=0.0")
    tuned = Training(tmp_path, "tuned", EXPERIMENT, told)
    complete(tuned)
    one, other = (load_file(p / "model.safetensors") for p in (slim, tuned.run.checkpoint(1)))
    weight = "0.base.weight"  # frozen, and so neither trained nor decayed
    assert torch.equal(one[weight], other[weight])
    assert not torch.equal(one["0.up"], torch.zeros_like(one["0.up"]))
    assert torch.equal(one["0.up"], other["0.up"])
    code, output, errors = call("score", *named(training), "--step", str(step), "--json")
    assert code == 0, errors
    assert json.loads(output)["metrics"] == json.loads(output)["recorded"]


def test_a_base_may_be_given_as_initial_weights_and_left_out(tmp_path: Path) -> None:
    first = Training(tmp_path, "one", EXPERIMENT, ("train.max_steps=3",))
    complete(first)
    given = tmp_path / "given.safetensors"
    save_file(load_file(first.run.checkpoint(3) / "model.safetensors"), given)
    told = (f"train.initial_weights={given}", "train.num_epochs=2", *OFTEN)
    calm = Training(tmp_path / "calm", "one", LEAN, told)
    complete(calm)
    killed = Training(tmp_path / "killed", "one", LEAN, told)
    stop_after(killed, signal.SIGKILL, 5)
    complete(killed)
    assert differences(final_state(calm.run), final_state(killed.run)) == []
    assert "0.base.weight" not in load_file(calm.run.checkpoint(12) / "model.safetensors")
    assert calm.start(stage="candidates").finish() == 0
    moved = given.rename(tmp_path / "moved.safetensors")
    elsewhere = (f"train.initial_weights={moved}", *told[1:])
    complete(Training(tmp_path / "calm", "one", LEAN, elsewhere))
    save_file({name: tensor + 1 for name, tensor in load_file(moved).items()}, moved)
    segment = Training(tmp_path / "calm", "one", LEAN, elsewhere).start()
    assert segment.finish() == 2
    assert "weight_files.initial_weights: 'sha256:" in segment.errors[-1]


def test_a_score_is_what_training_recorded(parent: Training) -> None:
    before = {path: path.stat().st_mtime_ns for path in parent.run.path.rglob("*")}
    code, output, errors = call("score", *named(parent), "--json")
    assert code == 0, errors
    found = json.loads(output)
    assert (found["step"], found["kind"], found["num_samples"]) == (72, "full", 96)
    assert found["metrics"] == found["recorded"]
    code, output, _ = call("score", *named(parent), "--step", str(FORKED_AT))
    assert code == 0
    assert output.startswith(f"step {FORKED_AT} of parent (epoch 4, full), 96 validation samples")
    assert {path: path.stat().st_mtime_ns for path in parent.run.path.rglob("*")} == before
    code, _, errors = call("score", *named(parent), "--step", "1")
    assert (code, errors.count("\n")) == (2, 1)


def test_a_fork_that_lost_its_checkpoint_does_not_begin_from_nothing(parent: Training) -> None:
    assert fork(parent, 36, "lost")[0] == 0
    child = resumed(parent, "lost")
    child.run.checkpoint(36).rename(child.run.path / "away")
    segment = child.start(arguments=RESUME)
    assert segment.finish() == 1
    assert "is a fork that began with step 36 of parent" in segment.errors[-1]
