"""What ``verify-resume`` and ``replay`` ask of the processes that they start, by a variable.

Nobody else sets HOLDFAST_TRIAL. A process that finds it stops itself by a real signal at a step
that was chosen before, so that two trials with one seed are the same trial.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "HOLDFAST_TRIAL"


@dataclass(frozen=True)
class Trial:
    """How one process life is to go.

    Attributes:
        stop_at: the step after which it sends itself ``stop_signal``; None for never.
        end_at: the step with which training ends; None for its own end.
        every_steps: save every so many steps, and at no other time.
        num_workers: loader processes, in the place of what a script asks for; None leaves it.
        look_at: before these steps, what lies in the script's variables is written down.
        look_file: where.
        trace_step: the step whose operators are written down, to ``trace_file``.
        replay_steps: the first and the last step that a script is to do again, saving nothing.
        replay_file: where what came of it is written.
        rank: of several processes, the one that stops; None for all, by way of their launcher.
    """

    stop_at: int | None = None
    stop_signal: str = "SIGKILL"
    end_at: int | None = None
    every_steps: int | None = None
    num_workers: int | None = None
    look_at: list[int] = field(default_factory=list)
    look_file: str | None = None
    trace_step: int | None = None
    trace_file: str | None = None
    replay_steps: tuple[int, int] | None = None
    replay_file: str | None = None
    rank: int | None = None

    def environment(self) -> dict[str, str]:
        """The variable that asks for it."""
        return {VARIABLE: json.dumps(asdict(self))}

    def after_step(
        self, step: int, rank: int | None = None, launcher_pid: int | None = None
    ) -> None:
        """Stop here, if this is the place; as one of several processes, its rank is told."""
        if step != self.stop_at:
            return
        number = signal.Signals[self.stop_signal]
        if rank is None or rank == self.rank:
            os.kill(os.getpid(), number)
        elif self.rank is None and rank == 0 and launcher_pid is not None:
            os.kill(launcher_pid, number)

    def settings(self) -> dict[str, Any]:
        """Settings of a run in the place of its own; none of them changes a byte."""
        if self.every_steps is None:
            return {}
        return {
            "checkpoint.every_steps": self.every_steps,
            "checkpoint.every_s": None,
            "checkpoint.is_auto": False,
            "logging.every_s": 0.0001,
        }

    def should_look(self, step: int, *, is_first: bool) -> bool:
        """Whether to look before the next step; ``look_at`` of 0 stands for a life's first one."""
        return step in self.look_at or (is_first and 0 in self.look_at)

    def write_look(self, step: int, seen: Mapping[str, Any]) -> None:
        """Add what was seen before the next step, after ``step`` steps."""
        assert self.look_file is not None
        path = Path(self.look_file)
        looks = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**looks, str(step): seen}))


def asked_trial() -> Trial:
    """What this process is asked for; nothing, for all but trials."""
    text = os.environ.get(VARIABLE)
    return Trial(**json.loads(text)) if text else Trial()
