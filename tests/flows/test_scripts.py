"""``holdfast run train.py``: a script with its own loop, through the whole pipeline."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.tasks.attempts import newest_step
from holdfast.training.code.archive import kept_code
from holdfast.training.runs.directory import RunDirectory, read_segments
from tests.faults.campaign import differences, final_state
from tests.flows.cluster import Cluster
from tests.flows.prefect_server import environment, wait_until
from tests.flows.recovery import PATIENCE_S, champion

SCRIPT = Path(__file__).parents[1] / "training/own_loop/champion_script.py"
NETWORK = "from torch import nn\n\n\ndef hidden() -> nn.Module:\n    return nn.ReLU()\n"


def project(folder: Path) -> Path:
    """A script with a module beside it, and what is not to travel."""
    folder.mkdir()
    text = SCRIPT.read_text()
    text = text.replace("nn.ReLU()", "network.hidden()").replace(
        "import holdfast\n", "import holdfast\nimport network\n"
    )
    assert text.count("network") == 2
    (folder / "train.py").write_text(text)
    (folder / "network.py").write_text(NETWORK)
    (folder / "my_secrets.json").write_text("{}")
    return folder / "train.py"


def holdfast(home: Path, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "holdfast", *arguments],
        cwd=folder,
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def home(tmp_path: Path, database_template: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(database_template, home / "prefect.db")
    return home


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_script_goes_on_from_its_archive_where_it_is_not(
    machines: Cluster, tmp_path: Path
) -> None:
    script = project(tmp_path / "project")
    folders = [tmp_path / name for name in ("first", "second", "calm")]
    for folder in folders:
        folder.mkdir()
    machines.start_rescuer()
    first = machines.start_machine("first", folder=folders[0])
    flow_run = machines.create_flow_run(
        "archived",
        (),
        experiment=f"sides={script}",
        arguments=["--steps", "400", "--pause", "0.05"],
    )
    run = RunDirectory(machines.store / "sides" / "archived")
    wait_until(lambda: newest_step(run) >= 50, PATIENCE_S, "steps", machines.story)
    first.vanish()
    machines.note("first: SIGKILL to everything")
    script.parent.rename(tmp_path / "elsewhere")
    machines.start_machine("second", folder=folders[1])

    assert machines.wait_for_state(flow_run, "Completed", "Failed") == "Completed"
    print(machines.timeline(flow_run))
    assert [s.outcome for s in read_segments(run)] == ["running", "completed"]
    assert run.bundle.is_dir()
    assert run.report_html.is_file()

    calm = RunDirectory(folders[2] / "store" / "sides" / "first")
    alone = [sys.executable, str(tmp_path / "elsewhere/train.py"), "--steps", "400"]
    subprocess.run(
        alone, check=True, cwd=folders[2], env=environment(tmp_path), capture_output=True
    )
    assert differences(final_state(calm), final_state(run)) == []
    assert champion(run)[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_script_that_was_stopped_is_resumed_without_it_and_shown(
    tmp_path: Path, home: Path
) -> None:
    script = project(tmp_path / "project")
    run = RunDirectory(tmp_path / "store/sides/first")
    arguments = ("--", "--steps", "100", "--pause", "0.1")
    process = holdfast(home, "run", str(script), "--store", "store", *arguments, folder=tmp_path)
    wait_until(lambda: newest_step(run) >= 10, PATIENCE_S, "steps")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "holdfast resume first" in errors
    assert kept_code(run) is not None
    (tmp_path / "project").rename(tmp_path / "elsewhere")

    status = holdfast(home, "status", "first", "--store", "store", folder=tmp_path)
    assert "to go on: holdfast resume" in status.communicate(timeout=300)[0]
    resumed = holdfast(home, "resume", "first", "--store", "store", "--json", folder=tmp_path)
    out, errors = resumed.communicate(timeout=800)
    assert resumed.returncode == 0, errors
    result = json.loads(out)["result"]
    assert (result["state"], result["published"]) == ("completed", "sides@1")
    assert [s.outcome for s in read_segments(run)] == ["preempted", "completed"]
    store = ("--store", "store")
    for command in (
        ("report", "first", *store),
        ("promote", "first", *store),
        ("pull", "sides@champion", "--to", "pulled", *store),
        ("verify", "pulled"),
    ):
        asked = holdfast(home, *command, folder=tmp_path)
        _, errors = asked.communicate(timeout=300)
        assert asked.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_script_without_a_champion_ends_with_its_checkpoints(tmp_path: Path, home: Path) -> None:
    script = project(tmp_path / "project")
    arguments = ("--", "--steps", "10", "--fault", "leaves")
    process = holdfast(home, "run", str(script), "--store", "store", *arguments, folder=tmp_path)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "the script hands over no champion" in errors
    assert "no bundle: the script hands over no champion" in out
    run = RunDirectory(tmp_path / "store/sides/first")
    assert run.report_html.is_file()
    assert newest_step(run) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "missing.py"), "missing.py does not exist; check the path"),
        (("run", "digits", "extra"), "digits is an experiment and takes no argument 'extra'"),
        (("run", str(SCRIPT), "--config", "a.toml"), "a script has its settings in holdfast.run"),
    ],
)
def test_bad_input_is_told_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    process = holdfast(tmp_path, *arguments, folder=tmp_path)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
