"""What a worker with --allow takes up, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from holdfast.flows.fleet.admission import ENTRYPOINT, Asked, differing, refusal
from tests.flows.cluster import Cluster
from tests.flows.prefect_server import REPOSITORY, wait_until

DIGITS = Asked("digits", ENTRYPOINT)


@pytest.mark.parametrize(
    ("pattern", "experiment", "is_taken"),
    [
        ("digits", "digits", True),
        ("digits", "digits2", False),
        ("digits", "DIGITS", False),
        ("ours.*:*", "ours.tasks:Task", True),
        ("ours.*:*", "theirs.tasks:Task", False),
        ("*", "/tmp/anything.py:Task", True),
        ("digits", None, False),
    ],
)
def test_experiments_are_taken_up_by_their_names(
    pattern: str, experiment: str | None, is_taken: bool
) -> None:
    assert (refusal(replace(DIGITS, experiment=experiment), (pattern,)) is None) == is_taken


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (replace(DIGITS, has_command=True), "job_variables.command"),
        (replace(DIGITS, entrypoint="/tmp/evil.py:flow"), "names the flow '/tmp/evil.py:flow'"),
        (replace(DIGITS, entrypoint=None), "names the flow None"),
        (replace(DIGITS, num_pull_steps=1), "pull steps"),
        (replace(DIGITS, working_folder="/tmp/x"), "working folder"),
        (replace(DIGITS, variables={"PYTHONPATH": "/tmp/x"}), "variable PYTHONPATH"),
        (replace(DIGITS, variables={"PREFECT_API_URL": "http://x"}), "variable PREFECT_API_URL"),
    ],
)
def test_what_could_run_another_command_is_refused(asked: Asked, named: str) -> None:
    assert refusal(asked, ()) is None
    assert named in (refusal(asked, ("*",)) or "")


def test_what_prefect_tells_its_engine_is_no_reason() -> None:
    here = {"PATH": "/bin", "PREFECT_API_URL": "http://a"}
    wanted = {**here, "PREFECT__FLOW_RUN_ID": "x", "PREFECT_CLIENT_MAX_RETRIES": "9"}
    assert refusal(replace(DIGITS, variables=differing(wanted, here)), ("digits",)) is None


def test_the_flow_is_the_one_that_is_deployed() -> None:
    definitions = yaml.safe_load((REPOSITORY / "deployments/prefect.yaml").read_text())
    assert {found["entrypoint"] for found in definitions["deployments"]} == {ENTRYPOINT}
    assert definitions["pull"] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_refuses_once_and_takes_up_the_rest(machines: Cluster, tmp_path: Path) -> None:
    """With a command of its own, and an experiment that is not allowed; neither leaves a trace."""
    proof = tmp_path / "command-was-run"
    with_command = machines.create_flow_run("command", ())
    with machines.client() as client:
        found = client.read_flow_run(with_command)
        assert found.deployment_id is not None
        commanded = client.create_flow_run_from_deployment(
            found.deployment_id,
            parameters=found.parameters,
            job_variables={"command": f"touch {proof}"},
        )
    foreign = machines.create_flow_run("foreign", (), experiment=f"{tmp_path}/evil.py:Task")
    machines.start_machine("worker", "--allow", "digits")
    for flow_run in (commanded.id, foreign):
        assert machines.wait_for_state(flow_run, "Failed", "Completed", "Crashed") == "Failed"
        assert "does not take it up" in (machines.history(flow_run)[-1].message or "")
    wait_until(lambda: machines.state(with_command) == "Running", 240, "digits", machines.story)
    assert not proof.exists()
