"""Steps that are done again have the losses that were kept, or the first other one is told."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from holdfast.training.certificate.replaying import replay
from holdfast.training.errors import InputError
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.exactness.trial import Trial
from holdfast.training.own_loop.environment import IS_STRICT, STORE
from holdfast.training.replay.comparison import Replayed, Steps, require_kept
from holdfast.training.runs.directory import (
    RunRecord,
    SegmentRecord,
    read_segments,
    utc_now,
    write_run_record_once,
    write_segment,
)
from holdfast.training.runs.losses import Difference, loss_path
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import Training, complete
from tests.generality.harness import OFTEN, stop_after
from tests.warm_start import WarmProcess

FORGETFUL = f"{Path(__file__).parents[2] / 'faults' / 'hard_experiment.py'}:Forgetful"
FAULTY = Path(__file__).parents[1] / "certificate" / "faulty_script.py"
POINTS = Path(__file__).parents[1] / "own_loop" / "points_script.py"
TIMEOUT_S = 240.0


def replayed(run: RunDirectory, steps: str, *others: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``replay``."""
    process = WarmProcess(
        ["replay", str(run.path), "--steps", steps, *others], child_environment(1)
    )
    out, errors = process.communicate(TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out, errors


def script(path: Path, folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """One life of a script that saves every third step. Exit code and errors."""
    surroundings = {**child_environment(1), STORE: str(folder), **environment}
    process = WarmProcess(arguments, surroundings, folder, path)
    _, errors = process.communicate(TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, errors


def everything(run: RunDirectory) -> dict[str, tuple[int, bytes]]:
    """All files of a run, with the times at which they and their folders were changed."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [run.path, *sorted(run.path.rglob("*"))]
    }


def test_a_run_of_several_processes_without_shards_is_refused(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "one")
    record = RunRecord(
        run_id="one", experiment="digits", config={}, config_digest="c", created_at=utc_now()
    )
    write_run_record_once(run, record)
    made = SegmentRecord(
        number=1, started_at=utc_now(), end_step=9, host="h", pid=1, num_processes=3
    )
    write_segment(run, made)
    run.losses.mkdir()
    loss_path(run, 1, 1).write_bytes(bytes(8 * 9))
    with pytest.raises(InputError, match=r"trained in 3 processes without distributed\.num_shards"):
        replay(run, Steps(2, 3), (), print, [])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run that was killed, and has completed."""
    overrides = (*OFTEN, "checkpoint.keep_last=50", "train.num_epochs=2")
    training = Training(tmp_path_factory.mktemp("replay"), "one", overrides=overrides)
    stop_after(training, signal.SIGKILL, 7)
    complete(training)
    return training.run


def test_steps_of_an_experiment_are_done_again_and_nothing_is_written(
    stopped: RunDirectory,
) -> None:
    before = everything(stopped)
    last = max(segment.end_step for segment in read_segments(stopped))
    code, out, errors = replayed(stopped, f"{last - 1}:{last}")
    assert code == 0, errors
    assert out.splitlines()[-1] == "same     all with the same bits"
    assert "the checkpoint of step" in out
    code, out, errors = replayed(stopped, "2:8", "--json")
    assert code == 0, errors
    told = json.loads(out)
    assert (told["is_same"], told["last_step"], told["difference"]) == (True, 8, None)
    assert told["num_compared"] == 8 - told["begun_after"]
    assert everything(stopped) == before


def test_the_first_step_that_differs_is_told_with_both_losses(tmp_path: Path) -> None:
    # The experiment counts its calls, and does not keep the count.
    training = Training(
        tmp_path, "one", FORGETFUL, (*OFTEN, "checkpoint.keep_last=50", "train.num_epochs=1")
    )
    complete(training)
    last = max(segment.end_step for segment in read_segments(training.run))
    code, out, errors = replayed(training.run, str(last))
    assert code == 1, errors
    assert out.splitlines()[-1].startswith("DIFFERS  step ")
    assert " in segment 1, and has " in out


def test_a_kept_loss_with_another_bit_is_told(stopped: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / stopped.path.parent.name / "one")
    shutil.copytree(stopped.path, run.path)
    file = max(run.losses.iterdir())
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)
    last = max(segment.end_step for segment in read_segments(run))
    code, out, errors = replayed(run, f"{last - 2}:{last}", "--json")
    assert code == 1, errors
    assert json.loads(out)["difference"]["step"] == last


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("a:b", "--steps a:b: expected FIRST:LAST, as 100:120, or one step"),
        ("9:8", "--steps 9:8: expected a first step of 1 or more"),
        ("0:3", "expected a first step of 1 or more"),
        ("8:900", "has done "),
    ],
)
def test_wrong_steps_are_told(stopped: RunDirectory, steps: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_kept(stopped, Steps.parse(steps))


def test_what_is_not_there_is_told_in_one_line(stopped: RunDirectory, tmp_path: Path) -> None:
    code, _, errors = replayed(RunDirectory(tmp_path / "none"), "1:2")
    assert (code, "there is no run at" in errors) == (2, True)
    run = RunDirectory(tmp_path / stopped.path.parent.name / "one")
    shutil.copytree(stopped.path, run.path)
    shutil.rmtree(run.losses)
    with pytest.raises(InputError, match="has kept no loss of these; it has none at all"):
        require_kept(run, Steps(1, 2))


@pytest.mark.slow
def test_steps_of_a_script_are_done_again_and_nothing_is_written(tmp_path: Path) -> None:
    killed = Trial(every_steps=3, stop_at=17)
    code, errors = script(POINTS, tmp_path, "steps", "store", **killed.environment())
    assert code == -9, errors
    code, errors = script(POINTS, tmp_path, "steps", "store")
    assert code == 0, errors
    run = RunDirectory(tmp_path / "points" / "one")
    before = everything(run)
    code, out, errors = replayed(run, "20:40")
    assert code == 0, errors
    assert out.splitlines()[-1] == "same     all with the same bits"
    assert everything(run) == before


@pytest.mark.slow
def test_a_script_that_forgets_differs_and_is_stopped_where_that_is_asked_for(
    tmp_path: Path,
) -> None:
    saving = Trial(every_steps=3)
    killed = Trial(every_steps=3, stop_at=8)
    code, errors = script(FAULTY, tmp_path, "counter", **killed.environment())
    assert code == -9, errors
    code, errors = script(FAULTY, tmp_path, "counter", **saving.environment(), **{IS_STRICT: "1"})
    assert code == 2, errors
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, errors
    assert "was done again in segment 2" in told[0]
    assert "(--strict makes this warning an error)" in told[0]
    run = RunDirectory(tmp_path / "faulty" / "one")
    assert [segment.outcome for segment in read_segments(run)] == ["running", "failed"]
    shutil.rmtree(run.path)
    code, errors = script(FAULTY, tmp_path, "counter", **saving.environment())
    assert code == 0, errors
    code, out, errors = replayed(run, "29:30")
    assert code == 1, errors
    assert out.splitlines()[-1].startswith("DIFFERS  step ")


def test_a_finding_is_the_same_after_a_file() -> None:
    found = Replayed(3, 5, 2, Difference(5, 1, 0.5, float("inf")), ("torch: 1 there, 2 here",))
    assert Replayed.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert Steps.parse("9") == Steps(9, 9)
    with pytest.raises(InputError, match="expected FIRST:LAST"):
        Steps.parse("1-2")
