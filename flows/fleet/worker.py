"""A process worker that drains: it lets its runs save and go elsewhere before it leaves.

Prefect's own worker kills its engines within 0.2 s of a SIGTERM and leaves their flow runs
``Running`` for ever. This one stops polling, sends SIGTERM to its engines, waits until each has
saved and handed its flow run over, and only then leaves.

What is not public API of Prefect 3.8 and why it is used: the worker's running engines are only
known inside ``ProcessWorker.run``; we override that public method and learn an engine's process id
from the ``task_status`` that Prefect itself passes in.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.states import Failed
from prefect.workers.process import (
    ProcessJobConfiguration,
    ProcessWorker,
    ProcessWorkerResult,
)

from holdfast.flows.fleet.admission import Asked, differing, refusal
from holdfast.flows.fleet.worker_link import DRAIN_SIGNAL, engine_environment
from holdfast.training.exactness.reproducibility import SAFE_PATH
from holdfast.training.runs.shown_text import shown

if TYPE_CHECKING:
    from anyio.abc import TaskStatus
    from prefect.client.schemas.objects import FlowRun

logger = logging.getLogger(__name__)

DRAIN_S = 28.0
LOOK_EVERY_S = 0.1
# What an engine needs to be seen and to outlive a restart of the server, unless it says otherwise.
ENGINE_DEFAULTS = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_CLIENT_MAX_RETRIES": "8"}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, DRAIN_SIGNAL)


class DrainingWorker(ProcessWorker):
    """A process worker that hands its runs over before it leaves."""

    type = ProcessWorker.type
    drain_s: float = DRAIN_S
    allowed: tuple[str, ...] = ()

    @classmethod
    def __dispatch_key__(cls) -> str | None:
        """Its own row in Prefect's table of workers, beside Prefect's own (not public API)."""
        return "holdfast-process"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.is_draining = False
        self.engines: dict[UUID, int] = {}

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Poll, unless draining."""
        return [] if self.is_draining else await super().get_and_submit_flow_runs()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        """Run an engine to its end, knowing its process id meanwhile; or refuse to."""
        reason = refusal(await self._asked(flow_run, configuration), self.allowed)
        if reason is not None:
            return await self._refuse(flow_run, reason, task_status)
        configuration.env = {
            **ENGINE_DEFAULTS,
            **SAFE_PATH,
            **configuration.env,
            **engine_environment(self.drain_s),
        }
        try:
            return await super().run(
                flow_run, configuration, _Overheard(task_status, self._started(flow_run.id))
            )
        finally:
            self.engines.pop(flow_run.id, None)

    async def _asked(self, flow_run: FlowRun, configuration: ProcessJobConfiguration) -> Asked:
        """What this flow run wants, as its deployment and the work pool have completed it."""
        if not self.allowed:
            return Asked(None, None)
        entrypoint, steps = None, []
        if flow_run.deployment_id is not None:
            deployment = await self.client.read_deployment(flow_run.deployment_id)
            entrypoint, steps = deployment.entrypoint, deployment.pull_steps or []
        experiment = flow_run.parameters.get("experiment")
        folder = configuration.working_dir
        here = {**os.environ, **configuration._base_environment()}
        return Asked(
            experiment=experiment if isinstance(experiment, str) else None,
            entrypoint=entrypoint,
            num_pull_steps=len(steps),
            has_command=configuration._command_configured,
            working_folder=str(folder) if folder is not None else None,
            variables=differing(configuration.env, here),
        )

    async def _refuse(
        self, flow_run: FlowRun, reason: str, task_status: TaskStatus[int] | None
    ) -> ProcessWorkerResult:
        """Failed, and not Crashed: a rescuer would have another worker try it."""
        message = f"worker {self.name!r} does not take it up: {reason}"
        logger.warning("%s (%s): %s", shown(flow_run.name), flow_run.id, shown(message))
        await self.client.set_flow_run_state(flow_run.id, Failed(message=message), force=True)
        if task_status is not None:
            task_status.started(os.getpid())
        return ProcessWorkerResult(status_code=0, identifier="refused")

    def _started(self, flow_run_id: UUID) -> Callable[[int], None]:
        def remember(pid: int) -> None:
            self.engines[flow_run_id] = pid

        return remember

    async def drain(self, printer: Callable[[str], None] = print) -> None:
        """Stop polling, stop the engines, and wait for them; SIGKILL for those that are late."""
        self.is_draining = True
        deadline_s = asyncio.get_running_loop().time() + self.drain_s
        told: set[int] = set()
        printer(f"worker {self.name!r} drains: {len(self.engines)} runs save and are handed over")
        while self.engines or self._submitting_flow_run_ids:
            for pid in set(self.engines.values()) - told:
                _signal_group(pid, signal.SIGTERM)
                told.add(pid)
            if asyncio.get_running_loop().time() > deadline_s:
                printer(f"worker {self.name!r}: {len(self.engines)} runs were too late")
                break
            await asyncio.sleep(LOOK_EVERY_S)
        for pid in self.engines.values():
            _signal_group(pid, signal.SIGKILL)


class _Overheard:
    """Prefect's task status, which we listen in on."""

    def __init__(self, inner: TaskStatus[int] | None, on_started: Callable[[int], None]) -> None:
        self._inner = inner
        self._on_started = on_started

    def started(self, value: int | None = None) -> None:
        """The engine runs; its process id."""
        assert value is not None
        self._on_started(value)
        if self._inner is not None:
            self._inner.started(value)

    def __getattr__(self, name: str) -> Any:
        # Prefect asks the status it passed in whether it was used (`_future`).
        return getattr(self._inner, name)


async def serve(worker: DrainingWorker, printer: Callable[[str], None] = print) -> None:
    """Run a worker until SIGTERM, SIGINT or an engine's word that the machine goes away.

    The second signal ends the wait: the engines are killed.
    """
    loop = asyncio.get_running_loop()
    is_stopping = asyncio.Event()
    is_hasty = asyncio.Event()

    def stop() -> None:
        (is_hasty if is_stopping.is_set() else is_stopping).set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(worker.start(printer=printer))
    stopped = asyncio.create_task(is_stopping.wait())
    await asyncio.wait({serving, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        drained = asyncio.create_task(worker.drain(printer))
        hasty = asyncio.create_task(is_hasty.wait())
        await asyncio.wait({drained, hasty, serving}, return_when=asyncio.FIRST_COMPLETED)
        for pid in worker.engines.values():
            _signal_group(pid, signal.SIGKILL)
        serving.cancel()
    with suppress(asyncio.CancelledError):
        await serving
    printer(f"worker {worker.name!r} has left")


def run_worker(
    pool: str,
    *,
    name: str | None,
    limit: int | None,
    drain_s: float,
    queues: tuple[str, ...] = (),
    allowed: tuple[str, ...] = (),
) -> None:
    """Take up runs from a work pool until told to stop; see ``admission`` for ``allowed``."""
    DrainingWorker.drain_s = drain_s
    DrainingWorker.allowed = allowed
    worker = DrainingWorker(
        work_pool_name=pool,
        work_queues=list(queues) or None,
        name=name,
        limit=limit,
        # A run that was handed over must not be taken up ahead of its time: its slot may still
        # be taken, which crashes a worker of Prefect 3.8 that has a limit.
        prefetch_seconds=0,
        create_pool_if_not_found=False,
    )
    asyncio.run(serve(worker))


def _signal_group(pid: int, number: signal.Signals) -> None:
    """An engine leads a group of its own; never signal our own group instead."""
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)
