"""What a worker takes up when it is told to take up some experiments alone. Pure; no Prefect.

Whoever reaches Prefect's API can ask a worker to run any experiment, and through the flow run, its
deployment or the work pool any command. Here is said what of it an admitting worker refuses. It
narrows who can do what; it does not put a run into a cage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

ENTRYPOINT = "holdfast.flows.pipeline.training_pipeline.training_pipeline"
FREE_VARIABLES = (
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY",
    "PREFECT_CLIENT_MAX_RETRIES",
    "PREFECT_LOGGING_LEVEL",
)
"""Variables that a run may set as it likes."""
OWN_PREFIX = "PREFECT__"  # Prefect's word about the flow run to its engine


@dataclass(frozen=True)
class Asked:
    """What a worker is asked to run.

    Attributes:
        experiment: the flow run's parameter; None where it has none.
        entrypoint: the flow that its deployment names.
        num_pull_steps: what its deployment wants done beforehand.
        has_command: whether a command is named in the place of the engine.
        working_folder: where it is to start; None for a folder of its own.
        variables: its environment, where that differs from the worker's.
    """

    experiment: str | None
    entrypoint: str | None
    num_pull_steps: int = 0
    has_command: bool = False
    working_folder: str | None = None
    variables: Mapping[str, str | None] = field(default_factory=dict)


def refusal(asked: Asked, patterns: tuple[str, ...]) -> str | None:
    """Why a worker does not take this up; None where it does.

    Args:
        asked: what it is asked to run.
        patterns: of experiments, as ``fnmatch`` has them. With none, everything is taken up.
    """
    if not patterns:
        return None
    foreign = sorted(
        name
        for name in asked.variables
        if name not in FREE_VARIABLES and not name.startswith(OWN_PREFIX)
    )
    reasons = {
        f"the experiment {asked.experiment!r} is none of {', '.join(patterns)}": not any(
            fnmatchcase(asked.experiment or "", pattern) for pattern in patterns
        ),
        f"its deployment names the flow {asked.entrypoint!r}, expected {ENTRYPOINT}": (
            asked.entrypoint != ENTRYPOINT
        ),
        f"its deployment has {asked.num_pull_steps} pull steps, which may run anything": (
            asked.num_pull_steps > 0
        ),
        "it names a command of its own (job_variables.command)": asked.has_command,
        f"it names a working folder, {asked.working_folder!r}, from which Python imports": (
            asked.working_folder is not None
        ),
        f"it sets the environment variable {', '.join(foreign)}": bool(foreign),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def differing(wanted: Mapping[str, str | None], here: Mapping[str, str]) -> dict[str, str | None]:
    """The variables of an environment that are not as they are here."""
    return {name: value for name, value in wanted.items() if here.get(name) != value}
