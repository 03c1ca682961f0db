"""The command line: fast, lazy, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from holdfast.flows.command_line.commands.status import told_widths
from holdfast.flows.command_line.group import COMMANDS, exit_code_of, load_command

HELP_LIMIT_S = 0.5


def holdfast(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "holdfast", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fastest_s(argv: list[str]) -> float:
    durations_s = []
    for _ in range(7):
        start_s = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        durations_s.append(time.perf_counter() - start_s)
    return min(durations_s)


def test_help_answers_at_once() -> None:
    python_s = fastest_s([sys.executable, "-c", "pass"])
    help_s = fastest_s([sys.executable, "-m", "holdfast", "--help"])
    print(f"python {python_s:.3f} s, holdfast --help {help_s:.3f} s, {help_s / python_s:.1f} times")
    assert help_s < max(HELP_LIMIT_S, 5 * python_s)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from holdfast.flows.command_line.group import exit_code_of; "
        "exit_code_of(['--help']); "
        "print([m for m in ('torch', 'prefect', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_no_option_takes_nan_for_a_number(name: str) -> None:
    command = load_command(name)
    context = click.Context(command)
    found = [command, *getattr(command, "commands", {}).values()]
    numbers = [one for each in found for one in each.params if one.type.name.startswith("float")]
    for option in numbers:
        with pytest.raises(click.BadParameter):
            option.type.convert("nan", option, context)


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_imports_torch(name: str) -> None:
    script = (
        f"import sys; from holdfast.flows.command_line.group import load_command; "
        f"load_command({name!r}); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_says_what_the_command_says(name: str) -> None:
    command = load_command(name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.short_help == COMMANDS[name]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert "Examples:" in told
    assert f"holdfast {name}" in told


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run"], "EXPERIMENT"),
        (["run", "digit"], "did you mean digits"),
        (["run", "digits", "--set", "train.num_epoch=5"], "did you mean 'num_epochs'"),
        (["run", "digits", "--set", "train.num_epochs=-1"], "train.num_epochs = -1"),
        (["run", "digits", "--set", "nonsense"], "section.key=value"),
        (["run", "digits", "--config", "/missing.toml"], "/missing.toml does not exist"),
        (["run", "digits", "--run-id", "a/b"], "cannot be a run id"),
        (["run", "digits", "--run-id", "{nihgt}"], "unknown placeholder"),
        (["run", "digits", "--store", "hdfs://bucket"], "begins with hdfs://"),
        (["run", "digits", "--set", "data.folder='/missing'"], "/missing is not a folder"),
        (["resume", "nothing"], "has no runs"),
        (["status", "nothing"], "has no runs"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(arguments) == 2
    told = capsys.readouterr()
    assert part in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""
    assert not list(tmp_path.glob("runs/*"))


def test_a_store_that_cannot_be_written_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert exit_code_of(["run", "digits", "--store", str(tmp_path / "file" / "runs")]) == 1
    assert "is not writable" in capsys.readouterr().err


def test_an_empty_store_says_how_to_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(["status", "--store", str(tmp_path)]) == 0
    assert "holdfast run digits" in capsys.readouterr().out


def test_status_is_json_for_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["status", "--store", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_server_that_does_not_answer_is_said_so_before_anything_begins(tmp_path: Path) -> None:
    done = holdfast(
        "run",
        "digits",
        "--store",
        str(tmp_path),
        PREFECT_API_URL="http://127.0.0.1:9/api",
        PREFECT_HOME=str(tmp_path / "prefect"),
    )
    assert done.returncode == 1
    assert "http://127.0.0.1:9/api does not answer" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "digits").exists()


def test_deploying_without_a_server_says_how_to_name_one(tmp_path: Path) -> None:
    environment = {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": ""}
    done = holdfast("deploy", "--store", str(tmp_path), **environment)
    assert done.returncode == 2
    assert "PREFECT_API_URL=http" in done.stderr


@pytest.mark.parametrize(
    ("widths", "told"),
    [
        ((), ""),
        ((3,), "3"),
        ((3, 3), "3"),
        ((4, 1, 3, 2), "4, then 1, then 3, then 2"),
        ((4, 4, 1, 4), "4 (2 segments), then 1, then 4"),
    ],
)
def test_status_tells_how_many_processes_each_segment_had(
    widths: tuple[int, ...], told: str
) -> None:
    assert told_widths(widths) == told


def test_doctor_examines_and_advises(tmp_path: Path) -> None:
    done = holdfast(
        "doctor", "--store", str(tmp_path), "--json", PREFECT_HOME=str(tmp_path / "prefect")
    )
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0
    subjects = {"versions", "store", "saving", "clock", "Prefect server", "torch", "processes"}
    assert set(findings) == {*subjects, "machines"}
    assert "two meet, and sum 16 MiB in" in findings["processes"]["detail"]
    assert "grace period of 30 s" in findings["saving"]["detail"]


def test_doctor_finds_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = str(tmp_path / "file" / "runs")
    done = holdfast("doctor", "--store", store, PREFECT_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "is not writable" in done.stdout
    assert "Traceback" not in done.stderr
