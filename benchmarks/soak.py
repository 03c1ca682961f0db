"""Random kills over one run: workers, engines, children and the server; then compare the bytes.

    python benchmarks/soak.py --kills 20 --experiment turbofan --set data.folder=/path/to/cmapss

Prints what was done, each state transition with its reason, and whether the final checkpoint and
the champion have the bytes of the run that nobody disturbed. Exit code 1 where they have not.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from holdfast.tasks.attempts import newest_step
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.ledger import ledger
from tests.flows.cluster import Cluster, Machine, cluster, train_whole
from tests.flows.prefect_server import make_template, wait_until
from tests.flows.recovery import champion, final_bytes

PATIENCE_S = 900.0
NUM_MACHINES = 2


@dataclass
class Soak:
    """One run that is disturbed."""

    machines: Cluster
    run: RunDirectory
    flow_run: UUID
    chance: random.Random
    num_started: int = 0
    deeds: Counter[str] = field(default_factory=Counter)

    def disturb(self) -> None:
        """Do one harmful thing, once checkpoints have moved on, and keep two machines up."""
        step = newest_step(self.run)
        wait_until(
            lambda: newest_step(self.run) > step or self.is_over(),
            PATIENCE_S,
            "a new checkpoint",
            self.machines.story,
        )
        if self.is_over():
            return
        time.sleep(self.chance.uniform(0, 3))
        name = self.chance.choice(list(DEEDS))
        done = DEEDS[name](self)
        self.deeds[name] += done
        self.machines.note(f"{name} at step {newest_step(self.run)}{'' if done else ': not there'}")
        print(self.machines.events[-1][1], flush=True)
        self.replace_machines()

    def is_over(self) -> bool:
        """Whether the run came to its end."""
        return self.machines.state(self.flow_run) in ("Completed", "Failed")

    def replace_machines(self) -> None:
        """Start machines until there are as many as there should be."""
        while len(self.living()) < NUM_MACHINES:
            self.machines.start_machine(f"machine-{self.num_started}")
            self.num_started += 1

    def living(self) -> list[Machine]:
        """Machines whose worker lives."""
        return [
            m
            for m in self.machines.machines.values()
            if m.name.startswith("machine") and m.process.poll() is None
        ]

    def training(self) -> Machine | None:
        """The machine that trains at the moment."""
        return next((m for m in self.living() if m.children()), None)


def signal_child(number: signal.Signals) -> Callable[[Soak], bool]:
    def act(soak: Soak) -> bool:
        machine = soak.training()
        children = machine.children() if machine else []
        for child in children:
            child.send_signal(number)
        return bool(children)

    return act


def kill_engine(soak: Soak) -> bool:
    machine = soak.training()
    engines = machine.engines() if machine else []
    for engine in engines:
        engine.kill()
    return bool(engines)


def give_notice(soak: Soak) -> bool:
    machine = soak.training()
    if machine is None:
        return False
    machine.notice()
    wait_until(machine.is_empty, 35, "an empty machine", machine.log)
    return True


def take_machine(soak: Soak) -> bool:
    machine = soak.training()
    if machine is not None:
        machine.vanish()
    return machine is not None


def restart_server(number: signal.Signals) -> Callable[[Soak], bool]:
    def act(soak: Soak) -> bool:
        soak.machines.server.stop(number)
        time.sleep(soak.chance.uniform(0, 10))
        soak.machines.server.start()
        return True

    return act


DEEDS: dict[str, Callable[[Soak], bool]] = {
    "child: SIGTERM": signal_child(signal.SIGTERM),
    "child: SIGKILL": signal_child(signal.SIGKILL),
    "engine: SIGKILL": kill_engine,
    "machine: notice": give_notice,
    "machine: vanishes": take_machine,
    "server: SIGTERM": restart_server(signal.SIGTERM),
    "server: SIGKILL": restart_server(signal.SIGKILL),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    arguments = parser.parse_args()
    overrides = ("checkpoint.every_s=3", "train.num_threads=1", *arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "prefect.db"
        make_template(template)
        whole = train_whole(Path(folder) / "whole", overrides, arguments.experiment)
        print(f"undisturbed: {newest_step(whole)} steps", flush=True)
        with cluster(Path(folder) / "cluster", template) as machines:
            run = RunDirectory(machines.store / arguments.experiment / "soak")
            flow_run = machines.create_flow_run("soak", overrides, experiment=arguments.experiment)
            soak = Soak(machines, run, flow_run, random.Random(arguments.seed))
            return run_soak(soak, whole, arguments.kills)


def run_soak(soak: Soak, whole: RunDirectory, num_kills: int) -> int:
    machines = soak.machines
    machines.start_rescuer("rescuer-0")
    machines.start_rescuer("rescuer-1")
    soak.replace_machines()
    while sum(soak.deeds.values()) < num_kills and not soak.is_over():
        soak.disturb()
    state = machines.wait_for_state(soak.flow_run, "Completed", "Failed", timeout_s=1800)
    print(machines.timeline(soak.flow_run))
    explain(soak, state)
    theirs = final_bytes(whole)
    differing = [name for name, content in final_bytes(soak.run).items() if content != theirs[name]]
    differing += ["champion"] if champion(soak.run) != champion(whole) else []
    print(f"bytes: {'equal' if not differing else f'DIFFERENT in {differing}'}")
    return 1 if differing or state != "Completed" else 0


def explain(soak: Soak, state: str) -> None:
    history = soak.machines.history(soak.flow_run)
    num_states = Counter(entry.name for entry in history)
    segments = read_segments(soak.run)
    print(f"\n{state} after {sum(soak.deeds.values())} disturbances: {dict(soak.deeds)}")
    print(f"{len(history)} states: {dict(num_states)}")
    num_starts = num_states["Running"] + num_states["Retrying"]
    print(f"started {num_starts} times: once, and once after each of {num_starts - 1} losses")
    print(f"{len(segments)} segments: {dict(Counter(s.outcome for s in segments))}")
    print(ledger(segments).as_table())


if __name__ == "__main__":
    sys.exit(main())
