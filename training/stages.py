"""The table of stages, and how one is run from its arguments to its outcome."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast.training.errors import HoldfastError, LoaderError
from holdfast.training.exactness.strictness import strictness
from holdfast.training.experiment.error_places import described
from holdfast.training.experiment.loading import is_script
from holdfast.training.rehearsal.before_run import rehearse_before_run
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.progress import Progress, ProgressFormat, as_text
from holdfast.training.runs.segment_log import SegmentLog, segment_log
from holdfast.training.runs.shown_text import ShownFormatter, shown
from holdfast.training.stage import (
    NoticeCameError,
    Stage,
    StageArguments,
    StageOutcome,
    failed_outcome,
    prepared_stage,
)

FIRST_STAGE, REPORT_STAGE = "segment", "report"
STAGES = {
    "segment": "holdfast.training.loop.segment:run_segment",
    "candidates": "holdfast.training.champion.candidates:run_candidates",
    "evaluate": "holdfast.training.champion.selection:run_evaluation",
    "export": "holdfast.training.bundles.stage:run_export",
    "promote": "holdfast.training.bundles.promotion:run_promotion",
    "report": "holdfast.training.reporting.stage:run_report",
}


def run_stage(name: str, options: dict[str, Any]) -> StageOutcome:
    """Run a stage and tell its outcome; never raises for what a user or a machine did.

    Errors are told in one line on stderr; what we did not foresee comes with its traceback.
    """
    arguments = StageArguments(**options)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with segment_log() as log:
        outcome = _outcome_of(name, arguments, log)
        if arguments.progress_format != "text":
            log.write(as_text("outcome", _summary(outcome, has_error=True)))
        emit_outcome(outcome, arguments.progress_format)
    return outcome


def _outcome_of(name: str, arguments: StageArguments, log: SegmentLog) -> StageOutcome:
    try:
        with strictness(arguments.is_strict):
            is_own_loop = is_script(arguments.experiment)
            work = _script_stage if is_own_loop else _experiment_stage
            return work(name, arguments, log)
    except NoticeCameError as error:
        return _preempted(error)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 the process boundary
        outcome = failed_outcome(error)
        _tell(error, outcome, arguments)
        return outcome


def _experiment_stage(name: str, arguments: StageArguments, log: SegmentLog) -> StageOutcome:
    rehearse = rehearse_before_run if name == FIRST_STAGE else None
    with prepared_stage(arguments, rehearse, log) as stage:
        return _stage_function(name)(stage)


def _script_stage(name: str, arguments: StageArguments, log: SegmentLog) -> StageOutcome:
    from holdfast.training.own_loop import hosting

    if name == FIRST_STAGE:
        return hosting.run_script_segment(arguments, log)
    if name == REPORT_STAGE:
        return _stage_function(name)(hosting.reported_stage(arguments, log))
    return hosting.run_script_stage(arguments, _stage_function(name), log)


def _preempted(error: NoticeCameError) -> StageOutcome:
    notice = None if error.notice is None else error.notice.as_record(time.monotonic())
    return StageOutcome("preempted", error.exit_code, notice=notice)


def emit_outcome(outcome: StageOutcome, progress_format: ProgressFormat) -> None:
    """The last event of a stage. People have read its error already, on a line of its own."""
    summary = _summary(outcome, has_error=progress_format == "jsonl")
    Progress(progress_format).emit("outcome", **summary)


def _stage_function(name: str) -> Callable[[Stage], StageOutcome]:
    if name not in STAGES:
        raise HoldfastError(f"this version of Holdfast has no stage {name}; it has {[*STAGES]}")
    module, _, function = STAGES[name].partition(":")
    found: Callable[[Stage], StageOutcome] = getattr(importlib.import_module(module), function)
    return found


def _tell(error: BaseException, outcome: StageOutcome, arguments: StageArguments) -> None:
    """The last line says it all. A traceback comes first, or the line says where it is."""
    assert outcome.error is not None
    line = str(error) if isinstance(error, HoldfastError) else described(error)
    record = _record_of(error, arguments.run) if isinstance(error, LoaderError) else None
    if record is not None:
        line += f"; the traceback is in {record}"
    elif isinstance(error, LoaderError) or not isinstance(error, HoldfastError):
        print(outcome.error["traceback"], file=sys.stderr, end="")
    print(f"error: {shown(' '.join(line.splitlines()))}", file=sys.stderr)


def _record_of(error: LoaderError, run: RunDirectory) -> Path | None:
    """The segment's record that keeps this error with its traceback, if one does."""
    try:
        newest = read_segments(run)[-1]
    except (HoldfastError, IndexError):
        return None
    is_kept = newest.error is not None and newest.error.message == str(error)
    return run.segment(newest.number) if is_kept else None


def _summary(outcome: StageOutcome, has_error: bool) -> dict[str, Any]:
    error = None
    if outcome.error is not None and has_error:
        error = {name: outcome.error[name] for name in ("type", "message")}
    return {
        "outcome": outcome.outcome,
        "step": outcome.step,
        "exit_code": outcome.exit_code,
        "error": error,
        **({} if outcome.has_champion is None else {"has_champion": outcome.has_champion}),
    }
