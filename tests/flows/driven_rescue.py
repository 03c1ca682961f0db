"""Trials of leases and rescuers by a clock that is driven, with delays of store and server.

Leases, watches, verdicts and the rescuer are the real ones, on real files. What is played is the
time, the server's record of one flow run, and processes that are killed, sleep or are late.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import AwaitingRetry, Pending, Running, State

from holdfast.flows.fleet import rescue
from holdfast.flows.fleet.rescue_policy import RescueSettings
from holdfast.tasks.engine_lease import ENGINE_TTL_S, HOLDER_NAME, Holder, engine_directory
from holdfast.training.configuration.schema import PreemptionConfig
from holdfast.training.errors import LeaseHeldError, LeaseLostError
from holdfast.training.runs import lease as lease_module
from holdfast.training.runs import lease_view
from holdfast.training.runs.durable_json import json_bytes
from holdfast.training.runs.lease import RENEWALS_PER_TTL, Lease
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.process_identity import ProcessIdentity

TRIAL_S = 150.0
POLL_S, ENGINE_S, CHILD_S, COMMIT_S = 1.0, 2.3, 3.7, 0.7
RETRY_S, PATIENCE_S, BUSY_S = 0.5, ENGINE_TTL_S + 5.0, 30.0


class Clock:
    """Stands for the module ``time``: whoever sleeps lets everybody else go on."""

    def __init__(self) -> None:
        self.now_s = 1.8e9
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def time(self) -> float:
        return self.now_s

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return round(self.now_s * 1e9)

    def now(self, zone: Any) -> datetime:
        """As ``datetime.now``."""
        return datetime.fromtimestamp(self.now_s, zone)

    def after(self, delay_s: float, act: Callable[[], None]) -> None:
        """Have something done later."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._numbers), act))

    def sleep(self, duration_s: float) -> None:
        """Let time pass, and everything happen that is due meanwhile."""
        end_s = self.now_s + duration_s
        while self._due and self._due[0][0] <= end_s:
            due_s, _, act = heapq.heappop(self._due)
            self.now_s = max(self.now_s, due_s)
            act()
        self.now_s = max(self.now_s, end_s)


class DrivenLease(Lease):
    """A lease that is renewed when the trial says so, by what its thread would call."""

    def _renew_until_stopped(self) -> None:
        self._should_stop.wait()


@dataclass
class Found:
    """What came of a trial.

    Attributes:
        notices_s: from each kill to the verdict.
        recoveries_s: from each kill to the first checkpoint of the next process.
        num_false: verdicts about an engine that ran, and was not asleep for as long as a lease.
        num_asleep: verdicts about an engine that slept, which woke up later.
        num_doubled: checkpoints of a writer that another had followed.
        num_stranded: kills after which nobody went on within a minute.
    """

    notices_s: list[float] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    num_false: int = 0
    num_asleep: int = 0
    num_doubled: int = 0
    num_stranded: int = 0


class Server:
    """One flow run, as Prefect's client shows it; every call takes its time."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        parameters = {"experiment": "digits", "store": str(trial.store), "run_id": "one"}
        self._flow_run = FlowRun(
            flow_id=uuid4(), deployment_id=uuid4(), parameters=parameters, run_count=0
        )
        self.history: list[State[Any]] = []
        self.set_state(AwaitingRetry(scheduled_time=trial.clock.now(UTC)))

    @property
    def run_count(self) -> int:
        return self._flow_run.run_count

    @property
    def state(self) -> State[Any]:
        assert self._flow_run.state is not None
        return self._flow_run.state

    def set_state(self, state: State[Any], run_count: int | None = None) -> None:
        """What a state is set to now."""
        state = state.model_copy(update={"timestamp": self._trial.clock.now(UTC)})
        count = self.run_count if run_count is None else run_count
        update = {"state": state, "run_count": count}
        self._flow_run = self._flow_run.model_copy(update=update)
        self.history.append(state)

    def read_flow_runs(self, offset: int = 0, **_: Any) -> list[FlowRun]:
        self._trial.pass_call()
        return [self._flow_run] if offset == 0 else []

    def read_flow_run(self, _: Any) -> FlowRun:
        self._trial.pass_call()
        return self._flow_run

    def read_flow_run_states(self, _: Any) -> list[State[Any]]:
        self._trial.pass_call()
        return [*self.history]

    def read_events(self, *_: Any, **__: Any) -> Any:
        self._trial.pass_call()
        return SimpleNamespace(events=[])

    def set_flow_run_state(self, _: Any, state: State[Any]) -> Any:
        self._trial.pass_call()
        if state.type is StateType.CRASHED and self.state.type is not StateType.CRASHED:
            self._trial.note_verdict()
        self.set_state(state)
        return SimpleNamespace(status=SimpleNamespace(value="ACCEPT"))


class Engine:
    """One start of the flow run on a machine of its own: engine and training child."""

    def __init__(self, trial: Trial, run_count: int) -> None:
        self.run_count = run_count
        self.killed_s: float | None = None
        self.sleeps_from_s = self.sleeps_until_s = 0.0
        self.leases: list[DrivenLease] = []
        self.is_over = False
        self._sleep_s = 0.0
        self._trial, self._clock = trial, trial.clock
        self._me = ProcessIdentity(f"machine-{run_count}", f"boot-{uuid4()}", "pids", 7, 7)
        self._begin(self._take_engine, PATIENCE_S)
        self._draw_fate()

    def _draw_fate(self) -> None:
        draws, at_s = self._trial.draws, self._trial.draws.uniform(8.0, 45.0)
        fate = draws.choices(("killed", "asleep", "lives"), (6, 2, 2))[0]
        if fate == "killed":
            self._clock.after(at_s, self._die)
        elif fate == "asleep":
            self._clock.after(at_s, lambda: self._fall_asleep(draws.uniform(1.0, 40.0)))

    def _die(self) -> None:
        if not self.is_over:
            self.killed_s, self.is_over = self._clock.now_s, True
            self._trial.killed.append(self)

    def _fall_asleep(self, duration_s: float) -> None:
        """Sleep from the next commit on, once the lease was looked at; or else at once."""
        if len(self.leases) > 1:
            self._sleep_s = duration_s
        else:
            self._sleep(duration_s)

    def _sleep(self, duration_s: float) -> None:
        self.sleeps_from_s, self.sleeps_until_s = self._clock.now_s, self._clock.now_s + duration_s

    def _awake(self, act: Callable[[], None]) -> Callable[[], None]:
        """Do it when this machine is awake, or never where it is gone."""

        def done() -> None:
            asleep_s = self.sleeps_until_s - self._clock.now_s
            if asleep_s > 0 and not self.is_over:
                self._clock.after(asleep_s, self._awake(act))
            elif not self.is_over:
                act()

        return done

    def _begin(self, take: Callable[[], None], patience_s: float) -> None:
        """Take a lease, again and again while another has it."""
        deadline_s = self._clock.now_s + patience_s

        def tried() -> None:
            try:
                take()
            except LeaseHeldError:
                if self._clock.now_s < deadline_s:
                    self._clock.after(RETRY_S, self._awake(tried))
                    return
                self._end()
                if self._trial.server.run_count == self.run_count:
                    self._trial.clock.after(BUSY_S, self._trial.ask_again)

        self._clock.after(0.0, self._awake(tried))

    def _take_engine(self) -> None:
        engine = engine_directory(self._trial.run)
        lease = self._hold(engine, ENGINE_TTL_S)
        holder = Holder(
            lease.generation, str(self._trial.server.read_flow_run(0).id), self.run_count
        )
        staged = lease.staging / HOLDER_NAME
        staged.write_bytes(json_bytes(holder.__dict__))
        staged.replace(engine.path / HOLDER_NAME)
        if self._trial.server.run_count == self.run_count:
            self._trial.server.set_state(Running())
        self._clock.after(CHILD_S, self._awake(lambda: self._begin(self._take_run, 60.0)))

    def _take_run(self) -> None:
        self._hold(self._trial.run, PreemptionConfig().lease_ttl_s)
        self._commit()

    def _hold(self, run: RunDirectory, ttl_s: float) -> DrivenLease:
        lease = DrivenLease._acquire_once(run, ttl_s, self._me)
        assert isinstance(lease, DrivenLease)
        self.leases.append(lease)
        self._renew(lease, ttl_s / RENEWALS_PER_TTL)
        return lease

    def _renew(self, lease: DrivenLease, every_s: float) -> None:
        def renewed() -> None:
            if lease._is_renewed():
                self._renew(lease, every_s)
            else:
                self._end()

        self._clock.after(every_s + self._trial.store_s(), self._awake(renewed))

    def _commit(self) -> None:
        """Look at the lease, and rename a staged checkpoint to its place some time later."""
        lease = self.leases[-1]
        try:
            lease.check()
        except LeaseLostError:
            self._end()
            return
        staged = lease.staging / "checkpoint"
        staged.mkdir(exist_ok=True)

        def renamed() -> None:
            step = round(100 * (self._clock.now_s - 1.8e9))
            try:
                staged.rename(self._trial.run.checkpoints / f"step-{step:08d}")
            except FileNotFoundError:
                self._end()
                return
            self._trial.note_commit(self, lease.generation)
            self._clock.after(COMMIT_S, self._awake(self._commit))

        if self._sleep_s:
            self._sleep(self._sleep_s)
            self._sleep_s = 0.0
        self._clock.after(self._trial.store_s(), self._awake(renamed))

    def _end(self) -> None:
        self.is_over = True
        self.release()

    def release(self) -> None:
        """Give the leases back; that of a process which was killed is nobody's to give."""
        for lease in self.leases:
            lease._should_stop.set()


class Trial:
    """One flow run, from its first start, among machines that come and go."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.draws, self.clock, self.found = random.Random(seed), Clock(), Found()
        self.store = folder / "store"
        self.run = RunDirectory(self.store / "digits" / "one")
        self.run.checkpoints.mkdir(parents=True)
        self.engines: list[Engine] = []
        self.killed: list[Engine] = []
        self._generations: list[int] = []
        self.server = Server(self)

    def play(self) -> Found:
        """Let the trial's time pass."""
        with driven(self):
            self._poll()
            for number in range(self.draws.choice((1, 2))):
                rescuer = rescue.Rescuer(RescueSettings(max_rescues=1000))
                self.clock.after(0.4 * number, lambda one=rescuer: self._look(one))
            self.clock.sleep(TRIAL_S)
        for engine in self.engines:
            engine.release()
        end_s = self.clock.now_s
        stranded = [e for e in self.killed if e.killed_s and e.killed_s < end_s - 60.0]
        self.found.num_stranded = len(stranded)
        return self.found

    def store_s(self) -> float:
        """What the store takes for one call."""
        kinds = ((0.005, 0.1), (0.1, 2.0), (2.0, 7.0))
        return self.draws.uniform(*self.draws.choices(kinds, (960, 35, 5))[0])

    def pass_call(self) -> None:
        """Let a call of the server take its time."""
        kinds = ((0.01, 0.15), (0.15, 2.0), (2.0, 9.0))
        self.clock.sleep(self.draws.uniform(*self.draws.choices(kinds, (940, 50, 10))[0]))

    def note_verdict(self) -> None:
        """Somebody takes the engine of the present attempt for dead."""
        engine = next((e for e in self.engines if e.run_count == self.server.run_count), None)
        if engine is None:
            return
        now_s = self.clock.now_s
        if engine.killed_s is not None:
            self.found.notices_s.append(now_s - engine.killed_s)
        elif (
            engine.sleeps_from_s < now_s - ENGINE_TTL_S / 2 and now_s < engine.sleeps_until_s + 9.0
        ):
            self.found.num_asleep += 1
        elif not engine.is_over:
            self.found.num_false += 1

    def note_commit(self, engine: Engine, generation: int) -> None:
        """A checkpoint got to its place."""
        self.found.num_doubled += any(generation < later for later in self._generations)
        self._generations.append(generation)
        for dead in [e for e in self.killed if e is not engine and e.killed_s is not None]:
            assert dead.killed_s is not None
            self.found.recoveries_s.append(self.clock.now_s - dead.killed_s)
            self.killed.remove(dead)

    def ask_again(self) -> None:
        """Have the flow run started again, as an engine does that could not begin."""
        self.server.set_state(AwaitingRetry(scheduled_time=self.clock.now(UTC)))

    def _poll(self) -> None:
        """A worker that takes up what is scheduled."""
        due = self.server.state.state_details.scheduled_time
        is_waiting = self.server.state.type is StateType.SCHEDULED and due is not None
        if is_waiting and due <= self.clock.now(UTC):
            count = self.server.run_count + 1
            self.server.set_state(Pending(), count)
            self.clock.after(ENGINE_S, lambda: self.engines.append(Engine(self, count)))
        self.clock.after(POLL_S, self._poll)

    def _look(self, rescuer: rescue.Rescuer) -> None:
        rescuer.look()
        self.clock.after(RescueSettings().every_s, lambda: self._look(rescuer))


@contextmanager
def driven(trial: Trial) -> Iterator[None]:
    """Within the block leases and rescuers live by the trial's clock, and with its server."""

    @contextmanager
    def client(**_: Any) -> Iterator[Server]:
        yield trial.server

    with (
        patch.object(lease_module, "time", trial.clock),
        patch.object(lease_view, "time", trial.clock),
        patch.object(rescue, "time", trial.clock),
        patch.object(rescue, "datetime", trial.clock),
        patch.object(rescue, "get_client", client),
        patch.object(os, "fsync", lambda _: None),  # no machine loses its disk here
    ):
        yield
