"""Weights & Biases: one run under one id, from every segment and machine.

Offline, which it is unless WANDB_API_KEY or WANDB_MODE says otherwise, each process leaves a folder
of W&B's in ``tracking/wandb/``; ``wandb sync`` makes one run of them, since they have one id.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from holdfast.training.tracking.points import Point
from holdfast.training.tracking.tracker import Tracked, plain_config
from holdfast.training.tracking.wandb_files import offline_steps

API_KEY, MODE = "WANDB_API_KEY", "WANDB_MODE"


class WandB:
    """Sends to Weights & Biases, or to a file that is synchronised later."""

    def __init__(self, tracked: Tracked) -> None:
        import wandb

        folder = tracked.run.tracking / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        self._newest: dict[str, int] = {}
        for step, tags in offline_steps(folder):
            self._newest |= {tag: max(step, self._newest.get(tag, 0)) for tag in tags}
        is_online = API_KEY in os.environ
        self._run = wandb.init(
            id=hashlib.sha256(tracked.identity.encode()).hexdigest()[:16],
            resume="allow",
            project=tracked.project,
            name=tracked.record.run_id,
            config=plain_config(tracked.record.config),
            dir=str(folder),
            mode=os.environ.get(MODE) or ("online" if is_online else "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(console="off", save_code=False, silent=True),
        )
        self._known = self._run.step - 1 if self._run.resumed else 0

    def newest(self) -> Mapping[str, int]:
        """As ``Tracker.newest``."""
        return _AtLeast(self._newest, self._known)

    def send(self, points: Iterable[Point]) -> None:
        """As ``Tracker.send``, but that W&B's own process has them a moment later."""
        for point in points:
            self._run.log({**point.values}, step=point.step)

    def close(self, *, is_completed: bool) -> None:  # noqa: ARG002
        """As ``Tracker.close``."""
        self._run.finish()


class _AtLeast(dict[str, int]):
    """Steps by tag; of a tag that is not there, what is known of all."""

    def __init__(self, steps: Mapping[str, int], known: int) -> None:
        super().__init__({tag: max(step, known) for tag, step in steps.items()})
        self._known = known

    def get(self, tag: str, default: Any = 0) -> Any:
        return super().get(tag, max(default, self._known))
