"""Scripts with their own loop: killed and stopped, and the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from holdfast.flows.command_line.group import holdfast
from holdfast.tasks.run_summary import experiment_reference
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.own_loop.environment import ALLOW_MISMATCH
from holdfast.training.runs.directory import read_run_record, read_segments
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import differences, final_state
from tests.warm_start import WarmProcess

SCRIPT = Path(__file__).with_name("points_script.py")
TIMEOUT_S = 240.0


def script(*arguments: str, folder: Path, **environment: str) -> tuple[int, str, str]:
    """Run the script with a store in ``folder``. Exit code, output and errors."""
    form, *others = arguments
    environment = {**child_environment(1), **environment}
    process = WarmProcess([form, "store", *others], environment, folder, SCRIPT)
    out, errors = process.communicate(TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out, errors


def run_in(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "store" / "points" / "one")


@pytest.mark.parametrize(
    ("form", "stops"),
    [
        ("steps", ("7:SIGKILL", "16:SIGTERM", "25:SIGKILL", "38:SIGTERM")),
        pytest.param("epochs", ("4:SIGKILL", "15:SIGTERM", "31:SIGKILL"), marks=pytest.mark.slow),
        pytest.param(
            "accumulated", ("3:SIGTERM", "11:SIGKILL", "19:SIGKILL"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_script_that_is_stopped_ends_with_the_bytes_of_a_calm_one(
    tmp_path: Path, form: str, stops: tuple[str, ...]
) -> None:
    folders = calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    for folder in folders:
        folder.mkdir()
    code, told, errors = script(form, folder=calm)
    assert (code, told.split()[0]) == (0, "done"), errors
    for number, stop in enumerate(stops):
        workers = f"--workers={2 * (number % 2)}"
        code, _, errors = script(form, stop, workers, folder=stopped)
        assert code == (-9 if "KILL" in stop else 75), errors
    code, told_again, errors = script(form, "--workers=2", folder=stopped)
    assert (code, told_again) == (0, told), errors
    assert differences(final_state(run_in(calm)), final_state(run_in(stopped))) == []
    compared = compare_losses(run_in(stopped))
    assert (compared.num_compared > 0, compared.num_different) == (True, 0)
    outcomes = [record.outcome for record in read_segments(run_in(stopped))]
    assert outcomes[-1] == "completed"
    assert set(outcomes[:-1]) == {"running", "preempted"}
    assert (run_in(stopped).logs / "segment-0001.log").read_text().count("progress") > 1


@pytest.mark.slow
def test_what_stands_at_the_top_of_an_epoch_counts_once(tmp_path: Path) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    for folder, stops in ((calm, ()), (stopped, ("12:SIGTERM", "15:SIGTERM", "22:SIGTERM"))):
        folder.mkdir()
        for stop in stops:  # within an epoch, and after the last step of one
            code, _, errors = script("epochs", stop, "--fault=tops", folder=folder)
            assert code == 75, errors
        code, _, errors = script("epochs", "--fault=tops", folder=folder)
        assert code == 0, errors
    assert differences(final_state(run_in(calm)), final_state(run_in(stopped))) == []


def test_a_resume_never_begins_after_the_last_step_of_an_epoch(tmp_path: Path) -> None:
    code, _, errors = script("epochs", "24:SIGKILL", "--fault=last loss", folder=tmp_path)
    assert code == -9, errors  # a save was due after step 24, and what follows it was not done
    code, _, errors = script("epochs", "--fault=last loss", folder=tmp_path)
    assert code == 0, errors


def test_a_finished_script_does_nothing_when_it_is_started_again(tmp_path: Path) -> None:
    code, told, _ = script("steps", folder=tmp_path)
    before = final_state(run_in(tmp_path))
    code, told_again, errors = script("steps", folder=tmp_path)
    assert (code, told_again) == (0, told), errors
    assert differences(before, final_state(run_in(tmp_path))) == []
    assert len(read_segments(run_in(tmp_path))) == 1


def test_the_record_names_the_script_and_its_configuration(tmp_path: Path) -> None:
    script("steps", "--fault=finishes early", folder=tmp_path)
    record = read_run_record(run_in(tmp_path))
    assert record.script is not None
    assert record.script.path == str(SCRIPT)
    assert record.config["experiment"] == {"rate": 0.01}
    [segment] = read_segments(run_in(tmp_path))
    assert (segment.outcome, segment.end_step) == ("completed", 11)


REFUSED = {
    "config": 'config["rate"] is an object; expected numbers, text, lists, dicts',
    "own setting": "'optimizer.name' is the script's own matter; leave it out",
    "validating": "'checkpoint.weights_every_steps' says when to validate, and a script does so by",
    "unknown setting": "'checkpoints.every_steps' is no key of Holdfast's; did you mean",
    "name": "'../one' cannot be a run id",
    "parallel": "no DataParallel: use one process for each device",
    "process group": "no DistributedDataParallel: ",
    "stateless": "an object has no state_dict and load_state_dict",
    "data loader": "no DataLoader: it cannot be told where it stands",
    "unkeepable": 'run.keep(average=…): its state_dict()["tensors"] is a set',
    "no model": "the script keeps no model",
    "nothing": "the script keeps no model",
    "two runs": "holdfast.run was called twice in one process",
    "batch outside": "next(loader) stands outside of a step",
    "late keep": "run.keep(late) came after training had begun",
    "value": 'run.values["best"] is a set; expected numbers, text, lists, dicts or tensors',
    "late value": 'run.values["best"] is a set; expected numbers, text, lists, dicts or tensors',
    "loss of each": "run.log(loss=…): expected a number, found a tensor of shape (3,)",
    "metric of each": "run.validated(loss=…): expected a number, found a tensor of shape (3,)",
    "inner parallel": "run.keep(model=…): no DataParallel in 0: use one process for each device",
    "sharded": "no FSDPModule: its weights lie in several processes: keep a model that is not",
    "engine": "no DeepSpeedEngine: its checkpoints are pickles, and it steps by itself",
    "fully sharded": "no FullyShardedDataParallel: it trains in several processes",
    "zero": "no ZeroRedundancyOptimizer: its state lies in several processes: keep the optimizer",
    "twice": "run.keep(again=…): it is kept already, as model: leave it out",
    "absent": "run.keep(scaler=…): found None; leave it out where there is none",
    "class": "run.keep(model=…): found the class Linear; expected an object of it",
    "no dict": "run.keep(average=…): its state_dict() returned an int, no dict",
    "thread's loop": "training began outside of the main thread",
    "thread": "holdfast.run was called outside of the main thread",
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    code, out, errors = script("steps", f"--fault={fault}", folder=tmp_path)
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert (code, out, len(told)) == (2, "", 1), errors
    assert REFUSED[fault] in told[0]
    assert f"({SCRIPT}:" in told[0]
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("plain epochs", "the first epoch of run.epochs(…) had no step: nothing of it is kept"),
        ("plain loop", "the script called holdfast.run and took no step from it"),
    ],
)
def test_a_loop_that_is_not_the_runs_is_told_of_with_its_first_update(
    tmp_path: Path, fault: str, error: str
) -> None:
    code, _, errors = script("steps", f"--fault={fault}", folder=tmp_path)
    first, last = errors.splitlines()
    assert "an optimizer moves outside of a step of the run: nothing of it is kept" in first
    assert (code, last.startswith(f"error: {error}")) == (2, True), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("new group", "group 1 of optimizer head_optimizer came, went"),
        ("new buffer", "head.usage came, went"),
    ],
)
def test_a_form_that_no_start_makes_is_told_of_when_it_is_saved(
    tmp_path: Path, fault: str, named: str
) -> None:
    code, _, errors = script("steps", "13:SIGTERM", f"--fault={fault}", folder=tmp_path)
    [told] = [line for line in errors.splitlines() if "came, went, or changed in shape" in line]
    assert (code, named in told) == (75, True), errors
    code, _, errors = script("steps", f"--fault={fault}", folder=tmp_path)
    assert (code, "Traceback" in errors) == (2, False), errors


@pytest.mark.slow
def test_a_buffer_that_grows_is_no_news(tmp_path: Path) -> None:
    _, _, errors = script("steps", "13:SIGTERM", "--fault=resized buffer", folder=tmp_path)
    assert "changed in shape" not in errors
    code, _, errors = script("steps", "--fault=resized buffer", folder=tmp_path)
    assert code == 0, errors


def test_a_data_set_that_the_loop_changes_is_told_of_once(tmp_path: Path) -> None:
    _, _, errors = script("epochs", "--fault=curriculum", folder=tmp_path)
    [told] = [line for line in errors.splitlines() if "Points.noise changed while" in line]
    assert "give the data set set_epoch(epoch)" in told


def test_another_configuration_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    script("steps", "7:SIGTERM", folder=tmp_path)
    code, _, errors = script("steps", "--rate=0.02", folder=tmp_path)
    assert code == 2
    assert "experiment.rate: 0.01 there, 0.02 here" in errors


def test_a_step_that_raises_is_recorded_and_the_next_start_goes_on(tmp_path: Path) -> None:
    code, _, errors = script("steps", "8:SIGKILL", "--fault=raises", folder=tmp_path)
    assert code == 1
    assert errors.rstrip().endswith("ValueError: the fan has stopped")
    [segment] = read_segments(run_in(tmp_path))
    assert segment.outcome == "failed"
    assert segment.error is not None
    assert segment.error.message == "the fan has stopped"
    code, told, _ = script("steps", folder=tmp_path)
    assert (code, told.split()[:2]) == (0, ["done", "40"])


def test_a_loop_that_ends_before_its_steps_says_so(tmp_path: Path) -> None:
    code, _, errors = script("steps", "--fault=ends early", folder=tmp_path)
    assert code == 2
    loop = SCRIPT.read_text().splitlines().index("    for step in run.steps(40):") + 1
    told = f"the script ended after step 10, and its loop had not ({SCRIPT}:{loop}): call run.fin"
    assert told in errors
    assert read_segments(run_in(tmp_path))[-1].outcome == "failed"


def test_an_epoch_that_is_left_by_break_says_so(tmp_path: Path) -> None:
    code, _, errors = script("epochs", "--fault=left epoch", folder=tmp_path)
    told = "error: the loop over the steps of an epoch was left within step 4, as by break: write"
    assert (code, told in errors) == (2, True), errors


@pytest.mark.slow
def test_a_last_epoch_that_is_left_by_break_is_told_of_and_the_run_is_done(tmp_path: Path) -> None:
    code, out, errors = script("epochs", "--fault=left last epoch", folder=tmp_path)
    assert (code, out.split()[:2]) == (0, ["done", "35"]), errors
    assert "the loop over the steps of an epoch was left within step 36, as by break" in errors


@pytest.mark.slow
def test_what_a_script_sets_where_another_configuration_is_asked_for_stays(tmp_path: Path) -> None:
    assert script("epochs", "12:SIGTERM", folder=tmp_path)[0] == 75  # within an epoch
    asked = ("epochs", "--fault=asked rate", "--rate=0.02")
    code, _, errors = script(*asked, folder=tmp_path, **{ALLOW_MISMATCH: "1"})
    assert code == 0, errors


def test_a_fork_of_the_script_does_not_touch_the_run(tmp_path: Path) -> None:
    code, _, _ = script("steps", "8:SIGTERM", "--fault=fork", folder=tmp_path)
    assert code == 75
    assert [s.outcome for s in read_segments(run_in(tmp_path))] == ["preempted"]


@pytest.mark.parametrize("fault", ["forked loop", "process's loop"])
def test_a_process_that_is_forked_and_trains_is_told_so_and_the_run_goes_on(
    tmp_path: Path, fault: str
) -> None:
    code, out, errors = script("steps", f"--fault={fault}", folder=tmp_path)
    assert (code, out.splitlines()[0]) == (0, "child 2"), errors
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "run.steps(…) was called in a process that the script forked" in line
    assert "Traceback" not in errors
    assert [s.outcome for s in read_segments(run_in(tmp_path))] == ["completed"]


def test_a_training_that_finishes_early_is_the_same_wherever_it_was_stopped(tmp_path: Path) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    for folder, stops in ((calm, []), (stopped, ["10:SIGTERM", "5:SIGKILL"])):
        folder.mkdir()
        for stop in stops:  # after step 10 all is saved, and one step is left
            script("steps", stop, "--fault=finishes early", folder=folder)
        code, _, errors = script("steps", "--fault=finishes early", folder=folder)
        assert code == 0, errors
    before = final_state(run_in(calm))
    assert differences(before, final_state(run_in(stopped))) == []
    code, told, errors = script("steps", folder=calm)  # it is over, and stays so
    assert (code, told.split()[1]) == (0, "11"), errors
    assert differences(before, final_state(run_in(calm))) == []


def test_metrics_are_where_selection_looks(tmp_path: Path) -> None:
    script("epochs", folder=tmp_path)
    state = json.loads((run_in(tmp_path).checkpoint(40) / "state.json").read_text())
    assert [record["step"] for record in state["history"]] == [8, 16, 24, 32, 40]
    assert all(record["metrics"]["loss"] > 0 for record in state["history"])


def test_the_command_line_says_how_a_script_goes_on(tmp_path: Path) -> None:
    script("steps", "7:SIGTERM", folder=tmp_path)
    told = CliRunner().invoke(holdfast, ["status", "one", "--store", str(tmp_path / "store")])
    again = f"holdfast exec {SCRIPT} steps store 7:SIGTERM"
    assert told.output.rstrip().endswith(f"to go on: {again}")
    script("steps", folder=tmp_path)
    told = CliRunner().invoke(holdfast, ["status", "one", "--store", str(tmp_path / "store")])
    assert "to go on" not in told.output
    last = f"for a bundle: holdfast resume {run_in(tmp_path).path} (where the script calls run.cham"
    assert told.output.splitlines()[-1].startswith(last)
    assert experiment_reference(run_in(tmp_path)) == f"points={SCRIPT}"
