"""Deploy to a real server, and let the schedule fire."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from holdfast.training.bundles.bucket_registry import open_registry
from holdfast.training.storage.address import Address
from holdfast.training.tiers.scratch import tier_folder
from holdfast.training.tiers.viewing import refresh_view
from tests.contracts.object_servers import make_bucket, moto

if TYPE_CHECKING:
    from conftest import PrefectServer

ADDRESS = Address("s3", "runs", "team")
DEPLOYMENTS = Path(__file__).resolve().parent.parent.parent / "deployments"
KINDS = ("process", "docker", "kubernetes")


def holdfast(
    server: PrefectServer, *arguments: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "holdfast", *arguments],
        cwd=folder,
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def ask(server: PrefectServer, path: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        server.api_url + path,
        data=json.dumps(body).encode() if body is not None else None,
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(
    scope="module",
    params=[KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])],
)
def deployed(
    request: pytest.FixtureRequest, prefect_server: PrefectServer, tmp_path_factory: Any
) -> tuple[str, Path]:
    """Kind of pool, and the store that was named."""
    store = tmp_path_factory.mktemp("store")
    kind = request.param
    arguments = ["deploy", "--pool", f"pool-{kind}", "--type", kind, "--store", str(store)]
    # Prefect looks for the flow in the folder that it stands in first; this one is not ours.
    (store / "holdfast.py").write_text("raise SystemExit('ran')\n")
    done = holdfast(prefect_server, *arguments, folder=store)
    assert done.returncode == 0, done.stderr
    return kind, store


def test_both_deployments_stand_on_the_server(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    kind, store = deployed
    for name in ("on-demand", "nightly"):
        found = ask(prefect_server, f"/deployments/name/training-pipeline/{name}")
        assert found["work_pool_name"] == f"pool-{kind}"
        assert found["parameters"]["store"] == str(store)
        assert found["entrypoint"] == "holdfast.flows.pipeline.training_pipeline.training_pipeline"
        assert found["pull_steps"] == []
        assert found["tags"] == ["holdfast"]


def test_the_form_shows_each_parameter_with_a_description(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    found = ask(prefect_server, "/deployments/name/training-pipeline/on-demand")
    schema = found["parameter_openapi_schema"]
    assert all(entry.get("description") for entry in schema["properties"].values())
    assert all("default" in entry for entry in schema["properties"].values())
    limits = schema["definitions"]["Limits"]["properties"]
    assert all(entry.get("description") for entry in limits.values())


def test_the_nightly_deployment_has_its_schedule_and_its_limit(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    found = ask(prefect_server, "/deployments/name/training-pipeline/nightly")
    schedule = found["schedules"][0]
    assert schedule["active"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == (
        "0 3 * * *",
        "Europe/Berlin",
    )
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "ENQUEUE"


def test_the_server_plans_the_coming_nights_each_under_its_own_time(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    """With SQLAlchemy 2.1 Prefect's scheduler fails at each insert, and nothing else tells."""
    nightly = {"deployments": {"name": {"any_": ["nightly"]}}}
    deadline_s = time.monotonic() + 90
    planned = ask(prefect_server, "/flow_runs/filter", nightly)
    while not planned and time.monotonic() < deadline_s:
        time.sleep(1)
        planned = ask(prefect_server, "/flow_runs/filter", nightly)
    starts = [run["expected_start_time"] for run in planned]
    assert len(set(starts)) == len(starts) > 0


def test_the_pool_on_the_server_is_the_one_of_the_file(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    kind, _ = deployed
    found = ask(prefect_server, f"/work_pools/pool-{kind}")
    assert found["type"] == kind
    written = json.loads((DEPLOYMENTS / "pools" / f"{kind}.json").read_text())
    assert found["base_job_template"] == written


def test_deploying_again_keeps_the_pool(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    kind, store = deployed
    arguments = ["deploy", "--pool", f"pool-{kind}", "--type", kind, "--store", str(store)]
    assert "is there" in holdfast(prefect_server, *arguments).stdout


def test_a_pool_of_another_type_is_refused(
    deployed: tuple[str, Path], prefect_server: PrefectServer
) -> None:
    kind, store = deployed
    other = next(name for name in KINDS if name != kind)
    arguments = ["deploy", "--pool", f"pool-{kind}", "--type", other, "--store", str(store)]
    done = holdfast(prefect_server, *arguments)
    assert done.returncode == 2
    assert f"is of type {kind}" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_with_a_bucket_the_pool_is_the_one_that_shares_no_folder(
    kind: str, prefect_server: PrefectServer
) -> None:
    arguments = ["--pool", f"bucket-{kind}", "--type", kind, "--store", "s3://my-bucket/runs"]
    done = holdfast(prefect_server, "deploy", *arguments)
    assert done.returncode == 0, done.stderr
    found = ask(prefect_server, f"/work_pools/bucket-{kind}")
    written = json.loads((DEPLOYMENTS / "pools" / f"{kind}_bucket.json").read_text())
    assert (found["type"], found["base_job_template"]) == (kind, written)
    nightly = ask(prefect_server, "/deployments/name/training-pipeline/nightly")
    assert nightly["parameters"]["store"] == "s3://my-bucket/runs"


def every_minute(folder: Path, pruning: str = "null") -> Path:
    """The project's definitions, with a schedule that fires every minute."""
    shutil.copytree(DEPLOYMENTS, folder)
    file = folder / "prefect.yaml"
    text = file.read_text()
    changed = re.sub(r'cron: "[^"]+"', 'cron: "* * * * *"', text)
    assert changed != text
    overrides = (
        """[train.num_epochs=1, train.num_threads=1, 'export.formats=["weights", "onnx"]']"""
    )
    shorter = f'overrides: {overrides}\n      run_id: "nightly'
    changed = changed.replace("pruning: null", f"pruning: {pruning}")
    file.write_text(changed.replace('run_id: "nightly', shorter))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_schedule_fires_and_each_night_is_a_run_of_its_own(
    prefect_server: PrefectServer, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = ["--pool", "every-minute", "--store", str(store)]
    definitions = every_minute(tmp_path / "deployments")
    deployed = holdfast(prefect_server, "deploy", *arguments, "--definitions", str(definitions))
    assert deployed.returncode == 0, deployed.stderr
    worker = subprocess.Popen(
        [sys.executable, "-m", "holdfast", "worker", "--pool", "every-minute"],
        env=prefect_server.environment,
        start_new_session=True,
    )
    try:
        nights = wait_for_nights(prefect_server, store, num_nights=2, timeout_s=1000)
    finally:
        pause(prefect_server)
        worker.send_signal(signal.SIGTERM)
        worker.wait(timeout=90)
    print("\n".join(nights))
    assert len(set(nights)) == len(nights) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_each_night_prunes_the_bucket_of_the_nights_before(
    prefect_server: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, whose bundle has a name: equal nights become champion one by one."""
    pytest.importorskip("obstore", reason="the extra 'bucket' is not installed")
    pytest.importorskip("moto", reason="moto is not installed")
    with moto() as cloud:
        make_bucket(cloud, "runs")
        told = {**cloud, "HOLDFAST_SCRATCH": str(tmp_path / "worker")}
        server = replace(prefect_server, environment={**prefect_server.environment, **told})
        for name, value in {**told, "HOLDFAST_SCRATCH": str(tmp_path / "watcher")}.items():
            monkeypatch.setenv(name, value)
        pruning = "{keep_last: 1, older_than_days: 0.00001}"
        definitions = every_minute(tmp_path / "deployments", pruning)
        arguments = ["--pool", "pruned", "--store", "s3://runs/team"]
        deployed = holdfast(server, "deploy", *arguments, "--definitions", str(definitions))
        assert deployed.returncode == 0, deployed.stderr
        worker = subprocess.Popen(
            [sys.executable, "-m", "holdfast", "worker", "--pool", "pruned"],
            env=server.environment,
            start_new_session=True,
        )
        seen: list[str] = []
        deadline_s = time.monotonic() + 1300
        try:
            while len(seen) < 3 or seen[1] in finished_nights(refresh_view(ADDRESS)):
                assert time.monotonic() < deadline_s, seen
                nights = finished_nights(refresh_view(ADDRESS))
                seen += [night for night in nights if night not in seen]
                if version_of("champion") is not None and version_of("reference") is None:
                    named = holdfast(server, "alias", "digits@1", "reference", *arguments[2:])
                    assert named.returncode == 0, named.stderr
                time.sleep(2)
        finally:
            pause(server)
            worker.send_signal(signal.SIGTERM)
            worker.wait(timeout=90)
        nights = finished_nights(refresh_view(ADDRESS))
        assert seen[0] in nights
        assert seen[1] not in nights
        assert len(nights) < len(seen)
        assert version_of("reference") == 1
        champion = version_of("champion")
        assert champion is not None
        assert champion >= 3


def version_of(alias: str) -> int | None:
    """The version that an alias stands for."""
    found = open_registry(tier_folder(ADDRESS, "work")).position("digits", alias)
    return None if found is None else found.version


def finished_nights(store: Path) -> list[str]:
    """Runs of nights that have come to their bundle."""
    return sorted(path.parent.name for path in store.glob("digits/nightly-*/bundle"))


def wait_for_nights(
    server: PrefectServer, store: Path, *, num_nights: int, timeout_s: float
) -> list[str]:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        nights = finished_nights(store)
        running = ask(
            server,
            "/flow_runs/filter",
            {
                "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}},
                "deployments": {"name": {"any_": ["nightly"]}},
            },
        )
        assert len(running) <= 1, "two nights at once"
        if len(nights) >= num_nights:
            return nights
        time.sleep(2)
    pytest.fail(f"only {sorted(p.name for p in store.glob('digits/*'))} after {timeout_s} s")


def pause(server: PrefectServer) -> None:
    """No further nights."""
    found = ask(server, "/deployments/name/training-pipeline/nightly")
    urllib.request.urlopen(
        urllib.request.Request(
            f"{server.api_url}/deployments/{found['id']}/pause_deployment", method="POST"
        ),
        timeout=60,
    ).close()
