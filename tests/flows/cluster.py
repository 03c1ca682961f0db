"""A real Prefect server, and machines that are groups of processes, for tests and benchmarks.

A machine is a worker, its engines and their training children. All of them carry the machine's
name in their environment (``HOLDFAST_HOST``), which also makes the lease take them for processes
of different machines. Only processes with such a name are ever signalled, by their ids.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil

from holdfast.training.runs.directory import RunDirectory
from tests.flows.prefect_server import (
    REPOSITORY,
    Server,
    environment,
    free_port,
    wait_until,
)

POOL = "machines"
FLOW = "holdfast.flows.pipeline.training_pipeline.training_pipeline"
# What follows training, as cheaply as it can be had.
CHEAP_EXPORT = ('export.formats=["weights", "onnx"]', "export.num_latency_runs=10")


def train_whole(
    store: Path, overrides: tuple[str, ...], experiment: str = "digits"
) -> RunDirectory:
    """A run as it is when nothing happens to it, up to the choice of its champion."""
    for stage in ("segment", "candidates", "evaluate"):
        argv = [sys.executable, "-m", "holdfast.training", stage, "--experiment", experiment]
        argv += ["--store", str(store), "--run-id", "whole", "--progress", "none"]
        argv += [part for override in overrides for part in ("--set", override)]
        argv += [] if stage == "segment" else ["--resume"]
        subprocess.run(argv, check=True, env=environment(store), cwd=REPOSITORY)
    return RunDirectory(store / experiment / "whole")


@dataclass
class Machine:
    """A worker and everything below it."""

    name: str
    host: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Every living process that carries this machine's name."""
        return [p for p in psutil.process_iter() if _is_named(p, self.host)]

    def children(self, stage: str = "segment") -> list[psutil.Process]:
        """The processes of a stage on this machine."""
        return [
            p for p in self.processes() if _has_arguments(p, ["-m", "holdfast.training", stage])
        ]

    def engines(self) -> list[psutil.Process]:
        return [p for p in self.processes() if _has_arguments(p, ["-m", "prefect.engine"])]

    def notice(self) -> None:
        """SIGTERM to the worker's whole process group."""
        os.killpg(self.process.pid, signal.SIGTERM)

    def vanish(self) -> None:
        """SIGKILL to all processes, which are stopped first: none sees another one die."""
        self.freeze()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """SIGSTOP to every process."""
        for _ in range(2):  # those that were started meanwhile, too
            self._signal_all(signal.SIGSTOP)

    def wake(self) -> None:
        """SIGCONT to every process."""
        self._signal_all(signal.SIGCONT)

    def is_empty(self) -> bool:
        return not self.processes()

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@dataclass
class Cluster:
    """A server, a work pool, and machines; use as a context manager."""

    folder: Path
    server: Server
    machines: dict[str, Machine] = field(default_factory=dict)
    suffix: str = field(default_factory=lambda: uuid4().hex[:8])
    events: list[tuple[float, str]] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def client(self) -> Any:
        """A synchronous client of the server; use as a context manager."""
        import httpx
        from prefect.client.orchestration import SyncPrefectClient

        return SyncPrefectClient(
            self.server.api_url, httpx_settings={"timeout": httpx.Timeout(60.0)}
        )

    def note(self, text: str) -> None:
        """Add a line to the timeline."""
        self.events.append((time.time(), text))

    def start_machine(
        self,
        name: str,
        *options: str,
        folder: Path | None = None,
        prefix: Sequence[str] = (),
        **variables: str,
    ) -> Machine:
        """Start a worker, in a folder."""
        arguments = ["worker", "--pool", POOL, "--name", name, *options]
        return self._started(name, self._start(name, arguments, variables, folder, prefix))

    def start_guest(
        self, name: str, run_id: str, store: str, prefix: Sequence[str] = (), **variables: str
    ) -> Machine:
        """Start ``holdfast join``."""
        arguments = ["join", run_id, "--store", store]
        return self._started(name, self._start(name, arguments, variables, prefix=prefix))

    def _started(self, name: str, process: subprocess.Popen[bytes]) -> Machine:
        machine = Machine(name, self.unique(name), self.folder, process)
        self.machines[name] = machine
        self.note(f"{name}: started")
        return machine

    def start_rescuer(self, name: str = "rescuer", *options: str) -> Machine:
        """Start ``holdfast rescue``."""
        machine = Machine(
            name, self.unique(name), self.folder, self._start(name, ["rescue", *options], {})
        )
        self.machines[name] = machine
        return machine

    def _start(
        self,
        name: str,
        arguments: list[str],
        variables: dict[str, str],
        folder: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        more = {"PREFECT_API_URL": self.server.api_url, "HOLDFAST_HOST": self.unique(name)}
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*prefix, sys.executable, "-m", "holdfast", *arguments],
                env=environment(home, **{**more, **variables}),
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
            )

    def unique(self, name: str) -> str:
        """A machine's name that no other cluster's machine has."""
        return f"{name}.{self.suffix}"

    def create_flow_run(
        self, run_id: str, overrides: tuple[str, ...], entrypoint: str = FLOW, **parameters: Any
    ) -> UUID:
        """Deploy the flow and ask for one run of it."""
        with self.client() as client:
            deployment = self._deploy(client, entrypoint)
            flow_run = client.create_flow_run_from_deployment(
                deployment,
                parameters={
                    "experiment": "digits",
                    "run_id": run_id,
                    "store": str(self.store),
                    "overrides": list(overrides),
                    **parameters,
                },
                name=run_id,
            )
        self.note("flow run created")
        return UUID(str(flow_run.id))

    def _deploy(self, client: Any, entrypoint: str) -> UUID:
        name = entrypoint.rpartition(".")[2]
        return UUID(
            str(
                client.create_deployment(
                    flow_id=client.create_flow_from_name(name.replace("_", "-")),
                    name="test",
                    entrypoint=entrypoint,
                    work_pool_name=POOL,
                    tags=["holdfast"],
                    pull_steps=[],
                )
            )
        )

    def create_pool(self) -> None:
        from prefect.client.schemas.actions import WorkPoolCreate
        from prefect.workers.process import ProcessWorker

        template = ProcessWorker.get_default_base_job_template()
        template["variables"]["properties"]["stream_output"]["default"] = False
        with self.client() as client:
            client.create_work_pool(
                WorkPoolCreate(name=POOL, type="process", base_job_template=template)
            )

    def state(self, flow_run_id: UUID) -> str:
        """The present state's name; empty where the server does not answer."""
        import httpx

        try:
            with self.client() as client:
                found = client.read_flow_run(flow_run_id).state
        except (httpx.HTTPError, OSError):
            return ""
        return found.name if found else ""

    def wait_for_state(self, flow_run_id: UUID, *names: str, timeout_s: float = 600.0) -> str:
        """Wait until the flow run is in one of these states; which one."""
        seen = ""

        def is_there() -> bool:
            nonlocal seen
            seen = self.state(flow_run_id)
            return seen in names

        wait_until(is_there, timeout_s, f"the flow run is {names}", tell=lambda: self.story(seen))
        return seen

    def history(self, flow_run_id: UUID) -> list[Any]:
        """All states of a flow run, the oldest first."""
        with self.client() as client:
            states = client.read_flow_run_states(flow_run_id)
        return sorted(states, key=lambda state: state.timestamp)

    def timeline(self, flow_run_id: UUID) -> str:
        """States and what was done, by time: for people."""
        rows = [
            (s.timestamp.timestamp(), f"{s.name:<14} {s.message or ''}"[:110])
            for s in self.history(flow_run_id)
        ]
        rows += [(at, f"               * {text}") for at, text in self.events]
        rows.sort()
        return "\n".join(f"{at - rows[0][0]:8.1f} s  {text}" for at, text in rows)

    def story(self, state: str = "") -> str:
        """Everything that helps to see why something did not happen."""
        logs = [f"--- {m.name}\n{m.log()[-3000:]}" for m in self.machines.values()]
        return f"state {state}\n" + "\n".join(logs)

    def begin(self) -> None:
        """Begin a new timeline."""
        self.events.clear()

    def remove_machines(self) -> None:
        """End every process but the server."""
        for machine in self.machines.values():
            machine.vanish()
        self.machines.clear()

    def close(self) -> None:
        """End every process that was started."""
        self.remove_machines()
        self.server.stop()


@contextmanager
def cluster(
    folder: Path, template: Path | None, database_url: str | None = None
) -> Iterator[Cluster]:
    """A running server with an empty work pool."""
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home-server"
    home.mkdir()
    if template is not None:
        shutil.copy(template, home / "prefect.db")
    built = Cluster(folder, Server(home, free_port(), database_url))
    try:
        built.server.start()
        built.create_pool()
        yield built
    finally:
        built.close()


def _is_named(process: psutil.Process, name: str) -> bool:
    try:
        return process.environ().get("HOLDFAST_HOST") == name
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def _has_arguments(process: psutil.Process, wanted: list[str]) -> bool:
    with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        arguments = process.cmdline()
        return any(arguments[i : i + len(wanted)] == wanted for i in range(len(arguments)))
    return False
