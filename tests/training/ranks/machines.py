"""A run of several machines, as users start it; a machine is what one command has started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.exactness.trial import Trial
from tests.faults.campaign import Segment, Training
from tests.flows.prefect_server import wait_until
from tests.network import Namespace
from tests.training.ranks.test_several_processes import OFTEN

PATIENCE_S = 120.0
END_S = 40.0
"""What docs/several_processes.md says of how soon all have ended."""
TWO = ("distributed.max_machines=2", "distributed.num_processes=2", "distributed.grow_after_s=0")
AT_ONCE = ("distributed.machines_wait_s=0",)
BOTH = ("distributed.min_machines=2",)
THREE = ("distributed.max_machines=3", "distributed.num_processes=1")
ALL_THREE = ("distributed.min_machines=3",)
SPREAD = (*OFTEN, "distributed.strategy=fsdp", "data.should_drop_last=true")


class Guest:
    """Another machine: ``join``, and the ranks that it starts."""

    def __init__(
        self,
        training: Training,
        folder: Path | None = None,
        network: Namespace | None = None,
        trial: Trial | None = None,
        scratch: str = "",
        name: str = "guest",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log_path = Path(folder or training.store) / f"guest-{time.monotonic_ns()}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = python_command(
            "holdfast.training", "join", training.run_id, "--store", str(training.store)
        )
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*(network.prefix if network else []), *command],
                env={
                    **child_environment(1),
                    "HOLDFAST_HOST": name,
                    "HOLDFAST_SCRATCH": scratch,
                    **(trial.environment() if trial else {}),
                    **(environment or {}),
                },
                cwd=folder,
                stderr=log,
                start_new_session=True,
            )

    def log(self) -> str:
        return self.log_path.read_text()

    def says(self, text: str) -> None:
        """Wait until it has said so."""
        wait_until(lambda: text in self.log(), PATIENCE_S, text, self.log)

    def vanish(self) -> None:
        """SIGKILL to it and its ranks."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finish(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(PATIENCE_S)


def first_of(
    training: Training,
    *overrides: str,
    address: str = "127.0.0.1",
    trial: Trial | None = None,
    scratch: str = "",
    name: str = "first",
    environment: Mapping[str, str] | None = None,
) -> Segment:
    """The machine that the run is started on."""
    told = [part for override in (*TWO, *overrides) for part in ("--set", override)]
    named = {"HOLDFAST_ADDRESS": address, "HOLDFAST_HOST": name, "HOLDFAST_SCRATCH": scratch}
    trials = trial.environment() if trial else {}
    return training.start({**named, **trials, **(environment or {})}, told)


def wait_for_steps(segment: Segment, num: int = 3) -> None:
    for _ in range(num):
        assert segment.wait_for("progress") is not None, "".join(segment.errors)
