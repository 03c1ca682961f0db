"""``holdfast rescue``: see that no flow run is stranded. See ``rescue_policy`` for the rules.

Several rescuers may run side by side: just before a change each reads the flow run again and goes
on only if its state is still the one that it judged.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.filters import EventFilter, EventNameFilter, EventResourceFilter
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import AwaitingRetry, Cancelled, Crashed

from holdfast.flows.fleet.rescue_policy import (
    RescueSettings,
    Sighting,
    Verdict,
    decide,
    rescue_message,
    rescued_steps,
)
from holdfast.flows.fleet.rescue_watch import Watches, see_engine
from holdfast.tasks.attempts import newest_step
from holdfast.tasks.news import tell_of_stuck
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.experiment.loading import experiment_name
from holdfast.training.runs.directory import RunDirectory
from holdfast.training.runs.run_ids import fill_run_id
from holdfast.training.runs.shown_text import ShownFormatter, shown
from holdfast.training.storage.opening import open_store
from holdfast.training.tiers.letting_go import let_go_of_dead
from holdfast.training.tiers.scratch import address_of, parsed_store, run_name
from holdfast.training.tiers.viewing import refresh_view, seen_tag

logger = logging.getLogger("holdfast.rescue")

WATCHED_STATES = [
    StateType.RUNNING,
    StateType.PENDING,
    StateType.CANCELLING,
    StateType.CRASHED,
    StateType.SCHEDULED,
]
PAGE = 200
API_ERRORS = (httpx.HTTPError, PrefectException)
OF_ALL = (401, 403, 408, 429)
"""Answers that every flow run would get."""
HEARTBEAT = "prefect.flow-run.heartbeat"


class Rescuer:
    """Looks at all flow runs of a tag, again and again. Remembers nothing that matters."""

    def __init__(self, settings: RescueSettings) -> None:
        self._settings = settings
        self._watches = Watches()
        self._last_look_s: float | None = None
        self._given_up: set[Any] = set()
        self._left_out: dict[Any, str] = {}

    def look(self) -> int:
        """Look at every flow run once, and act; the number of flow runs looked at.

        Never raises for a server that does not answer: every watch begins anew then.
        """
        now_s = time.monotonic()
        longest_s = self._settings.every_s + self._settings.gap_s
        if self._last_look_s is not None and now_s - self._last_look_s > longest_s:
            logger.warning("asleep for %.0f s: every watch begins anew", now_s - self._last_look_s)
            self._watches.forget()
        try:
            with get_client(sync_client=True) as client:
                flow_runs = list(self._flow_runs(client))
                for flow_run in flow_runs:
                    self._attend_alone(client, flow_run)
        except (*API_ERRORS, OSError) as error:
            logger.warning("the server does not answer, nothing is marked: %s", _first_line(error))
            self._watches.forget()
            flow_runs = []
        else:
            self._watches.keep_only({str(flow_run.id) for flow_run in flow_runs})
            known = {flow_run.id for flow_run in flow_runs}
            self._left_out = {key: told for key, told in self._left_out.items() if key in known}
        self._last_look_s = time.monotonic()
        return len(flow_runs)

    def _flow_runs(self, client: SyncPrefectClient) -> Iterator[FlowRun]:
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[self._settings.tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=WATCHED_STATES)),
        )
        offset = 0
        while True:
            page = client.read_flow_runs(
                flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=PAGE, offset=offset
            )
            yield from page
            if len(page) < PAGE:
                return
            offset += PAGE

    def _attend_alone(self, client: SyncPrefectClient, flow_run: FlowRun) -> None:
        """Attend to one flow run; what is wrong with it alone keeps no other one waiting."""
        try:
            self._attend(client, flow_run)
        except API_ERRORS as error:
            if not _is_about_one(error):
                raise
            self._leave_out(flow_run, error)
        except Exception as error:  # noqa: BLE001 - of its parameters or its store, whatever they hold
            self._leave_out(flow_run, error)

    def _leave_out(self, flow_run: FlowRun, error: Exception) -> None:
        self._watches.forget_about(str(flow_run.id))
        if self._left_out.get(flow_run.id) != repr(error):
            self._left_out[flow_run.id] = repr(error)
            told = f"{type(error).__name__}: {_first_line(error)}"
            logger.warning("%s (%s) is left out: %s", shown(flow_run.name), flow_run.id, told)

    def _attend(self, client: SyncPrefectClient, flow_run: FlowRun) -> None:
        seen = self._see(client, flow_run)
        verdict = decide(seen, self._settings)
        if verdict.action == "wait":
            return
        if verdict.action == "retry" and flow_run.deployment_id is None:
            verdict = Verdict("give_up", "no deployment says how to start it again")
        if verdict.action == "give_up":
            self._give_up(flow_run, verdict)
            return
        assert flow_run.state is not None
        fresh = client.read_flow_run(flow_run.id)
        if fresh.state is None or fresh.state.id != flow_run.state.id:
            return  # somebody else was faster
        state = _new_state(verdict, seen)
        result = client.set_flow_run_state(flow_run.id, state)
        logger.warning(
            "%s (%s): %s -> %s: %s [%s]",
            shown(flow_run.name),
            flow_run.id,
            shown(flow_run.state.name),
            state.name,
            verdict.reason,
            result.status.value,
        )
        if verdict.action == "crash":
            self._let_go(flow_run)
            crashed = client.read_flow_run(flow_run.id)
            if crashed.state is not None and crashed.state.type is StateType.CRASHED:
                self._attend(client, crashed)  # it may be started again at once

    def _let_go(self, flow_run: FlowRun) -> None:
        """Spare the next engine its own watch of a head in a bucket that was watched from here."""
        try:
            run = run_of(flow_run)
            address = None if run is None else address_of(run.path.parent.parent)
            if run is not None and address is not None:
                tag, unchanged_s = self._watched_head(str(flow_run.id), run)
                let_go_of_dead(open_store(address), run_name(run), tag, unchanged_s)
        except HoldfastError as error:
            logger.info("the next engine of %s watches for itself: %s", flow_run.id, error)

    def _watched_head(self, key: str, run: RunDirectory) -> tuple[str, float]:
        """The tag of a run's head in a bucket, and for how long it was seen not to move."""
        tag = seen_tag(run)
        return tag, self._watches.unchanged_s((key, "head"), tag, time.monotonic())

    def _give_up(self, flow_run: FlowRun, verdict: Verdict) -> None:
        assert flow_run.state is not None
        if flow_run.state.id not in self._given_up:
            self._given_up.add(flow_run.state.id)
            name = shown(flow_run.name)
            logger.error("%s (%s) stays crashed: %s", name, flow_run.id, verdict.reason)
            tell_of_stuck(flow_run.name, verdict.reason)

    def _see(self, client: SyncPrefectClient, flow_run: FlowRun) -> Sighting:
        assert flow_run.state is not None
        state, key, now_s = flow_run.state, str(flow_run.id), time.monotonic()
        unchanged_s = self._watches.unchanged_s((key, "state"), str(state.id), now_s)
        run = run_of(flow_run)
        if run is not None and address_of(run.path.parent.parent) is not None:
            self._watched_head(key, run)
        if state.type is StateType.CRASHED:
            history = client.read_flow_run_states(flow_run.id)
            ordered = sorted(history, key=lambda past: past.timestamp)
            return Sighting(
                "CRASHED",
                unchanged_s,
                crash_age_s=(datetime.now(UTC) - state.timestamp).total_seconds(),
                step=_step(run),
                rescues=rescued_steps(past.message or "" for past in ordered),
            )
        if state.type is StateType.SCHEDULED:
            return Sighting("SCHEDULED", unchanged_s, is_in_process_retry=_is_in_process(flow_run))
        if state.type is StateType.PENDING:
            return Sighting("PENDING", unchanged_s)
        engine = see_engine(self._watches, run, key, flow_run.run_count, now_s) if run else None
        heartbeat_s = 0.0 if engine else self._heartbeat_unchanged_s(client, flow_run, now_s)
        return Sighting(
            state.type.value,
            unchanged_s,
            heartbeat_unchanged_s=heartbeat_s,
            engine=engine,
            step=_step(run),
        )

    def _heartbeat_unchanged_s(
        self, client: SyncPrefectClient, flow_run: FlowRun, now_s: float
    ) -> float:
        page = client.read_events(
            EventFilter(
                event=EventNameFilter(name=[HEARTBEAT]),
                resource=EventResourceFilter(id=[f"prefect.flow-run.{flow_run.id}"]),
            ),
            limit=1,
        )
        newest = str(page.events[0].id) if page.events else None
        return self._watches.unchanged_s((str(flow_run.id), "heartbeat"), newest, now_s)


def run_of(flow_run: FlowRun) -> RunDirectory | None:
    """The run directory that a flow run works in; None where its parameters don't tell.

    Of a bucket, what can be read of it now. Raises StorageError where that does not answer.
    """
    told = flow_run.parameters
    try:
        experiment, store, template = (told[key] for key in ("experiment", "store", "run_id"))
        name = experiment_name(str(experiment))
        start = flow_run.expected_start_time or datetime.now(UTC)
        run_id = fill_run_id(str(template), experiment=name, start=start, flow_run=str(flow_run.id))
        address = parsed_store(str(store))
    except (KeyError, InputError):
        return None
    if address is not None:
        return RunDirectory(refresh_view(address, f"{name}/{run_id}") / name / run_id)
    path = Path(str(store).removeprefix("file://"))
    is_path = path.is_absolute() and "\0" not in f"{path}{name}"
    return RunDirectory(path / name / run_id) if is_path else None


def _is_about_one(error: Exception) -> bool:
    """Whether an error of the server is about the flow run that was asked about, not the server."""
    if isinstance(error, ObjectNotFound):
        return True
    if not isinstance(error, httpx.HTTPStatusError):
        return False
    return error.response.is_client_error and error.response.status_code not in OF_ALL


def rescue(settings: RescueSettings, *, is_once: bool) -> int:
    """Watch until SIGTERM or Ctrl-C, or for one window; the exit code."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    is_stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_stopping.set())
    rescuer = Rescuer(settings)
    longest_s = max(settings.heartbeat_s, settings.pending_s) + 2 * settings.every_s
    end_s = time.monotonic() + longest_s if is_once else None
    logger.info(
        "looking after flow runs with the tag %r every %g s", settings.tag, settings.every_s
    )
    while not is_stopping.is_set():
        rescuer.look()
        if end_s is not None and time.monotonic() > end_s:
            break
        is_stopping.wait(settings.every_s)
    logger.info("leaving; another rescuer, or this one later, goes on")
    return 0


def _new_state(verdict: Verdict, seen: Sighting) -> State[Any]:
    if verdict.action == "crash":
        return Crashed(message=f"lost: {verdict.reason}")
    if verdict.action == "cancel":
        return Cancelled(message=f"cancelled; {verdict.reason}")
    return AwaitingRetry(
        scheduled_time=datetime.now(UTC) + timedelta(seconds=verdict.pause_s),
        message=rescue_message(seen.step, verdict.reason),
    )


def _is_in_process(flow_run: FlowRun) -> bool:
    policy = flow_run.empirical_policy
    return policy is not None and policy.retry_type == "in_process"


def _step(run: RunDirectory | None) -> int | None:
    """The newest checkpoint of a run; None where the store is out of sight."""
    try:
        return newest_step(run) if run is not None and run.path.is_dir() else None
    except (OSError, ValueError):  # it may not be entered, or can be no path
        return None


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [type(error).__name__])[0], 200)
