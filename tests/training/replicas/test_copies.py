"""A script's own loop in several processes: killed and stopped, and the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.training.data.batch_plan import FixedSizePlan
from holdfast.training.distributed.stopping import AgreedMonitor
from holdfast.training.distributed.world import World
from holdfast.training.errors import InputError
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.own_loop.opening import run_config
from holdfast.training.replicas.copies import Copies
from holdfast.training.runs.directory import read_segments
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import differences, final_state
from tests.training.own_loop.loaders import loader_of

SCRIPT = Path(__file__).with_name("sides_script.py")
TIMEOUT_S = 240.0


def script(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the script in ``folder``. Exit code, output and errors."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-P", str(SCRIPT), *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=child_environment(1),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def run_in(folder: Path) -> RunDirectory:
    return RunDirectory(folder / "store" / "sides" / "one")


@pytest.mark.slow
def test_three_processes_that_are_killed_and_stopped_end_with_the_bytes_of_calm_ones(
    tmp_path: Path,
) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    code, told, errors = script(calm)
    assert (code, told.split()[0]) == (0, "done"), errors
    for stop, expected in (("7:SIGKILL:2", 1), ("16:SIGTERM", 75), ("22:SIGKILL", -9)):
        code, _, errors = script(stopped, stop)
        assert code == expected, errors
        if expected == 1:
            assert errors.splitlines()[-1].startswith("error: rank 2 (process ")
            assert "was ended by SIGKILL" in errors.splitlines()[-1]
    code, told_again, errors = script(stopped)
    assert (code, told_again) == (0, told), errors
    assert differences(final_state(run_in(calm)), final_state(run_in(stopped))) == []
    compared = compare_losses(run_in(stopped))
    assert (compared.num_compared > 0, compared.num_different) == (True, 0)
    assert {record.num_processes for record in read_segments(run_in(stopped))} == {3}


FAULTS = {
    "raises": (1, "rank 2: the third process has had enough ("),
    "ends": (2, "run.finish() was called by 1 of 3 processes in step 7: they must do the same"),
    "own value": (2, "have other values than rank "),
    "alone": (2, "3 processes train, and no model of theirs was made by run.parallel(model)"),
    "uneven": (2, "run.loader(batch_size=10): 3 processes take equal parts of each batch; give a"),
    "short": (2, "the last batch of an epoch has 4 samples, which 3 processes cannot take equal"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_ends_one_process_ends_all_and_is_one_line(tmp_path: Path, fault: str) -> None:
    expected, told = FAULTS[fault]
    code, _, errors = script(tmp_path, "--fault", fault)
    assert code == expected, errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert told in last
    assert errors.count("error: ") == 1
    if fault == "raises":
        log = run_in(tmp_path).logs / "segment-0001-rank-2.log"
        assert "ValueError: the third process has had enough" in log.read_text()


@pytest.mark.slow
def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    assert script(tmp_path, "4:SIGTERM")[0] == 75
    code, _, errors = script(tmp_path, "--processes", "2")
    assert code == 2
    assert "distributed.num_processes: 3 there, 2 here" in errors.splitlines()[-1]


@pytest.mark.slow
def test_a_resume_in_several_processes_is_certified(tmp_path: Path) -> None:
    command = python_command("holdfast", "verify-resume", "--", str(SCRIPT))
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "exact    0 bytes differ" in done.stdout


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("strategy", "fsdp", "expected 'ddp' or 'none', found 'fsdp', which is for experiments"),
        ("num_shards", 4, "'distributed.num_shards': a step of a script is one pass"),
        ("max_machines", 2, "'distributed.max_machines': the processes of a script are on one"),
    ],
)
def test_what_is_for_experiments_alone_is_refused(key: str, value: object, told: str) -> None:
    settings = {"distributed.strategy": "ddp", f"distributed.{key}": value}
    with pytest.raises(InputError) as raised:
        run_config(0, None, settings)
    assert told in str(raised.value)


@pytest.mark.parametrize("rank", range(3))
def test_each_process_takes_its_part_of_every_batch_in_the_order_of_one(rank: int) -> None:
    copies = Copies(World(rank, 3), 0, AgreedMonitor([], World(rank, 3)))
    loader = loader_of(
        range(50), batch_size=12, drop_last=True, collate_fn=list, seed=7, copies=copies
    )
    whole = FixedSizePlan(50, 12, True, 7)
    for step in range(4):
        assert next(loader) == whole.indices(0, step)[4 * rank : 4 * rank + 4].tolist()
