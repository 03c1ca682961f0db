"""How much time and how many failures a run is given, and how long a store keeps runs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """Two budgets: preemptions are normal, crashes are not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grace_period_s: float = Field(
        30.0, gt=0, description="Seconds that a stage gets to save, from a stop to SIGKILL."
    )
    max_crashes: int = Field(
        3, ge=0, description="Crashes in a row, without progress between them, that are retried."
    )
    crash_backoff_s: float = Field(
        5.0, ge=0, description="Seconds before the first retry; doubled at each further one."
    )
    max_idle_preemptions: int = Field(
        20, ge=1, description="Preemptions in a row without a new step, after which the run fails."
    )


class Pruning(BaseModel):
    """What a store keeps: see ``holdfast prune``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keep_last: int = Field(
        ge=1, description="Newest runs of each experiment, and versions of each bundle, that stay."
    )
    older_than_days: float = Field(
        gt=0, description="What was changed within so many days stays, too."
    )
