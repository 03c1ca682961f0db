"""What a rehearsal finds, by name, and what it leaves alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.training.checkpointing.overlap import Overlap
from holdfast.training.loop import segment
from holdfast.training.rehearsal.acting import perform
from holdfast.training.rehearsal.findings import Finding
from holdfast.training.rehearsal.request import Depth, RehearsalRequest, read_told
from holdfast.training.rehearsal.telling import Telling
from tests.faults.campaign import HARD
from tests.training.late_stream import LateStream

HERE = Path(__file__).with_name("rehearsed_experiments.py")
GENERALITY = Path(__file__).parents[2] / "generality"
BFLOAT16 = str(Path(__file__).parents[1] / "parity" / "odd_exports.py:Bfloat16")
OF_ALL_KINDS = (
    "test_adversaries.py:Gan",
    "test_own_steps.py:Sharp",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "test_own_steps.py:Oscillator",
            "test_own_steps.py:MuonBesideAdamW",
            "test_self_supervision.py:Moco",
            "test_rates.py:NanoGpt",
        )
    ),
)


def found(name: str, folder: Path, *overrides: str, depth: Depth = "step") -> list[Finding]:
    """Findings of a rehearsal in this process."""
    experiment = name if ":" in name else f"{HERE}:{name}"
    request = RehearsalRequest(
        experiment, str(folder), str(folder), 1, overrides=overrides, depth=depth
    )
    telling = Telling(request)
    with ExitStack() as stack:
        try:
            perform(request, telling, stack)
        except Exception as error:  # noqa: BLE001  # as the process does
            telling.fail(error)
    told = read_told(request.told)
    return [Finding(**line["finding"]) for line in told if line["kind"] == "finding"]


RESTORED = ("Plain", "ToldEpochs", "Caches", "DrawsGlobally", "LateBuffer", "ExtraState", HARD)
RESTORED_TOO = ("OwnOrder", "ToldPlace", "Remembers", "SetsItself", "ZeroAtFirst")


@pytest.mark.parametrize(
    "name",
    [*RESTORED, *(pytest.param(name, marks=pytest.mark.slow) for name in RESTORED_TOO)],
)
def test_what_a_resume_restores_is_not_complained_of(name: str, tmp_path: Path) -> None:
    assert found(name, tmp_path) == []


def test_a_snapshot_beside_the_computation_is_held_against_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = LateStream()
    monkeypatch.setattr(segment, "copy_stream", lambda _: stream)
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    assert found("Plain", folders[0]) == []
    assert sum(stream.num_copied) > 0
    monkeypatch.setattr(Overlap, "watch", lambda *_: None)  # the wait that is missing
    [finding] = found("Plain", folders[1])
    assert (finding.severity, finding.act) == ("error", "snapshot beside")
    assert "optimizer/" in finding.message
    assert finding.message.endswith("differ; write checkpoint.should_overlap=false")
    assert found("Plain", folders[2], "checkpoint.should_overlap=false") == []


@pytest.mark.parametrize("name", OF_ALL_KINDS)
def test_steps_and_groups_of_ones_own_are_restored(name: str, tmp_path: Path) -> None:
    assert found(f"{GENERALITY}/{name}", tmp_path) == []


def test_what_an_optimizer_keeps_beside_its_state_is_named(tmp_path: Path) -> None:
    [finding] = found("CountingOptimizer", tmp_path)
    assert finding.severity == "warning"
    assert "optimizers['Counting']['num_steps'] changed while training and" in finding.message


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("LeavesOut", (), "LeavesOut.parameter_groups leaves out "),
        ("Twice", (), "Twice.parameter_groups names a parameter more than once: "),
        ("Plain", ("optimizer.name=LBFGS",), "its step() needs a closure: write optimizers(model)"),
        ("Plain", ("scheduler.name=LambdaLR",), "write rate_factor(step) in the experiment"),
        ("Plain", ("optimizer.name=nowhere:Lion",), "module nowhere cannot be imported"),
        ("Plain", ('scheduler.optimizers=["critic"]',), "there is no optimizer 'critic'"),
    ],
)
def test_optimizers_that_cannot_be_are_an_error_before_the_first_step(
    name: str, overrides: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    [finding] = found(name, tmp_path, *overrides)
    assert (finding.severity, finding.act) == ("error", "data and model")
    assert message in finding.message
    assert "\n" not in finding.message


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("BufferLeftOut", "model.0.scale"),
        ("OwnGenerator", "model.0.draws"),
        ("CarriedState", "model.0.hidden"),
        ("Counter", "experiment.num_calls"),
        ("Adversary", "experiment.critic.bias"),
        ("GlobalDraws", "global GLOBAL_GENERATOR"),
        ("GlobalCount", "global GLOBAL_COUNTS['calls']"),
        ("LateGenerator", "experiment.draws changed while training and is in no checkpoint"),
        ("NewWeights", "the model was another one when it was built again: "),
        ("DataDraws", "(data set.draws changed); a data set must not keep state"),
        ("AddsEpochs", "told set_epoch(2) alone, as after a resume: "),
        ("DataCounts", "(data set.num_fetched changed); a data set must not keep state"),
    ],
)
def test_what_a_resume_loses_is_a_warning_that_names_it(
    name: str, named: str, tmp_path: Path
) -> None:
    findings = found(name, tmp_path)
    assert {finding.severity for finding in findings} == {"warning"}
    assert any(named in finding.message for finding in findings), findings


def test_nothing_is_promised_of_speed(tmp_path: Path) -> None:
    findings = found("Counter", tmp_path, "train.mode=speed")
    assert [finding.severity for finding in findings] == ["note"]


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        ("HoldsASet", "two steps", "experiment/seen is a set"),
        ("Forgetful", "save and restore", "state.json/experiment/num_calls differ; state_dict()"),
        ("Nondeterministic", "two steps", "in loss): use another operator there, or"),
        ("NondeterministicBackwards", "two steps", "or give exactness up with train.mode=speed"),
        ("NondeterministicInLibrary", "two steps", f"({HERE}:"),
        ("Empty", "data and model", "the split validation has no samples"),
        (
            "OneLeft",
            "last batch",
            "of one sample, and batch norm has no statistics of one",
        ),
        ("Unit", "validation", "resampling_unit = 'engine' must name a record"),
        ("GrowsByEpoch", "later epoch", "set_epoch(1) of Growing changed its length from 40 to 32"),
        ("OutsideOrder", "data and model", "order(1) must give at least one index of a sample"),
    ],
)
def test_what_would_fail_later_is_an_error_with_the_way_out(
    name: str, act: str, message: str, tmp_path: Path
) -> None:
    [finding] = found(name, tmp_path)
    assert (finding.severity, finding.act) == ("error", act)
    assert message in finding.message
    assert "\n" not in finding.message


def test_a_data_set_must_travel_to_loader_processes_where_there_are_some(tmp_path: Path) -> None:
    for folder in (tmp_path / "with", tmp_path / "without"):
        folder.mkdir()
    [finding] = found("Unpicklable", tmp_path / "with", "data.num_workers=2")
    assert "cannot be sent to a loader process" in finding.message
    assert found("Unpicklable", tmp_path / "without") == []
    assert found("Plain", tmp_path, "data.num_workers=2") == []


def test_what_is_not_tried_is_told(tmp_path: Path) -> None:
    [finding] = found("Plain", tmp_path, "train.should_compile=true")
    assert finding == Finding(
        "note", "data and model", "the model is compiled in the run alone, not here"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.metric=accuracy", "selection.mode=max or selection.mode=min"),
        ("promotion.metric=accuracy", "promotion.metric = 'accuracy' is not a metric"),
        ("checkpoint.keep_above={f1=0.5}", "checkpoint.keep_above = 'f1' is not a metric"),
        ("preemption.grace_period_s=1e-9", "more than the preemption.grace_period_s=1e-09"),
        ("data.batch_tokens=9", "data.batch_tokens = 9 needs a data set that knows"),
        ("rehearsal.depths=step", "did you mean"),
    ],
)
def test_the_configuration_is_held_against_the_experiment(
    override: str, message: str, tmp_path: Path
) -> None:
    [finding] = found("Plain", tmp_path, override)
    assert message in finding.message


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        pytest.param("ZeroAtFirst", "", "", marks=pytest.mark.slow),
        ("ConstantOutput", "", ""),
        ("Orthogonal", "export onnx", "No ONNX function found for <OpOverload(op='aten.linalg_m"),
        ("RaggedAndDeclared", "", ""),
        *(
            pytest.param(name, "", "", marks=pytest.mark.slow)
            for name in ("Images", "KeyedAndNamed", "OneDict", "NamedInputs")
        ),
        (
            BFLOAT16,
            "export onnx",
            "x is bfloat16, which ONNX Runtime does not compute with on a CPU",
        ),
        ("Keyed", "batch norm", "found a dict with the keys input, label: return the model's"),
        (
            "Ragged",
            "signature",
            "dynamic_dimensions of the experiment names: pad them to one length",
        ),
    ],
)
def test_exports_are_tried_from_weights_that_are_hardly_trained(
    name: str, act: str, message: str, tmp_path: Path
) -> None:
    formats = 'export.formats=["weights", "onnx"]'
    errors = found(name, tmp_path, formats, depth="export")
    assert [(one.severity, one.act) for one in errors] == ([("error", act)] if act else [])
    assert all(one.message.count(message) == 1 for one in errors), errors  # told once
