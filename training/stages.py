"""The table of stages, and how one is run from its arguments to its outcome."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any

from training.errors import HoldfastError
from training.progress import Progress
from training.stage import Stage, StageArguments, StageOutcome, failed_outcome, prepared_stage

STAGES = {
    "segment": "training.segment:run_segment",
    "export": "training.export.stage:run_export",
    "promote": "training.export.promotion:run_promotion",
}


def run_stage(name: str, options: dict[str, Any]) -> StageOutcome:
    """Run a stage and tell its outcome; never raises for what a user or a machine did.

    Errors are told in one line on stderr; what we did not foresee comes with its traceback.
    """
    arguments = StageArguments(**options)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        with prepared_stage(arguments) as stage:
            outcome = _stage_function(name)(stage)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 the process boundary
        outcome = failed_outcome(error)
        _tell(error, outcome)
    # People have read the error already, on a line of its own.
    is_for_programs = arguments.progress_format == "jsonl"
    Progress(arguments.progress_format).emit(
        "outcome", **_summary(outcome, has_error=is_for_programs)
    )
    return outcome


def _stage_function(name: str) -> Callable[[Stage], StageOutcome]:
    if name not in STAGES:
        raise HoldfastError(f"this version of Holdfast has no stage {name}; it has {[*STAGES]}")
    module, _, function = STAGES[name].partition(":")
    found: Callable[[Stage], StageOutcome] = getattr(importlib.import_module(module), function)
    return found


def _tell(error: BaseException, outcome: StageOutcome) -> None:
    assert outcome.error is not None
    if not isinstance(error, HoldfastError):
        print(outcome.error["traceback"], file=sys.stderr, end="")
    print(f"error: {outcome.error['message'] or outcome.error['type']}", file=sys.stderr)


def _summary(outcome: StageOutcome, has_error: bool) -> dict[str, Any]:
    error = None
    if outcome.error is not None and has_error:
        error = {name: outcome.error[name] for name in ("type", "message")}
    return {
        "outcome": outcome.outcome,
        "step": outcome.step,
        "exit_code": outcome.exit_code,
        "error": error,
    }
