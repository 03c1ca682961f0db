"""How a stage that did not complete is told to the flow."""

from __future__ import annotations

import shlex

from holdfast.tasks.child import StageCommand, StageOutcome
from holdfast.training.errors import HoldfastError, InputError


class StageFailedError(HoldfastError):
    """A stage failed for good; ``holdfast resume`` goes on once the cause is gone."""


class StageInputError(InputError):
    """A stage refused its input; trying again without changing it is pointless."""


def stage_error(command: StageCommand, outcome: StageOutcome) -> StageFailedError | StageInputError:
    """The error of a failed stage: why, the end of its log, and how to see it again."""
    if outcome.exit_code == InputError.exit_code:
        message = outcome.error["message"] if outcome.error else outcome.explain()
        return StageInputError(str(message))
    lines = [
        f"{command.stage} of {command.job.experiment}/{command.job.run_id} failed: "
        f"{outcome.explain()}",
        f"the same by hand: {shlex.join(command.argv())}",
        f"once the cause is gone: holdfast resume {command.job.run_id} "
        f"--store {shlex.quote(str(command.job.store))}",
    ]
    if outcome.log_tail:
        lines += ["last lines of its log:", *(f"  {line}" for line in outcome.log_tail)]
    return StageFailedError("\n".join(lines))
