"""The table of stages, and how one is run from its arguments to its outcome."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.training.distributed.seat import Seat, own_seat, take_seat
from holdfast.training.errors import HoldfastError, LoaderError
from holdfast.training.exactness.strictness import strictness
from holdfast.training.experiment.error_places import described
from holdfast.training.experiment.loading import is_script
from holdfast.training.preemption.notices import PreemptionMonitor
from holdfast.training.preemption.sources import build_sources
from holdfast.training.rehearsal.before_run import rehearse_before_run
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.progress import Progress, ProgressFormat, as_text
from holdfast.training.runs.segment_log import SegmentLog, segment_log
from holdfast.training.runs.shown_text import ShownFormatter
from holdfast.training.stage import (
    NoticeCameError,
    Resolved,
    Stage,
    StageArguments,
    StageOutcome,
    failed_outcome,
    prepared_stage,
    resolve_arguments,
    resolve_told,
    tell_error,
)
from holdfast.training.tiers.late_files import await_all
from holdfast.training.told_errors import error_line

FIRST_STAGE, REPORT_STAGE = "segment", "report"
STAGES = {
    "segment": "holdfast.training.loop.segment:run_segment",
    "candidates": "holdfast.training.champion.candidates:run_candidates",
    "evaluate": "holdfast.training.champion.selection:run_evaluation",
    "export": "holdfast.training.bundles.stage:run_export",
    "promote": "holdfast.training.bundles.promotion:run_promotion",
    "report": "holdfast.training.reporting.stage:run_report",
}


def run_stage(name: str, options: dict[str, Any], command_line: Sequence[str] = ()) -> StageOutcome:
    """Run a stage and tell its outcome; never raises for what a user or a machine did.

    ``command_line`` is what other processes of the same training are started with. Errors are told
    in one line on stderr; what we did not foresee comes with its traceback.
    """
    arguments = StageArguments(**options)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(ShownFormatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    with segment_log() as log:
        outcome = _outcome_of(name, arguments, log, command_line)
        if own_seat() is not None or outcome.should_start_again:
            return outcome  # told by the launcher, or by what comes after
        if arguments.progress_format != "text":
            log.write(as_text("outcome", _summary(outcome, has_error=True)))
        emit_outcome(outcome, arguments.progress_format)
    return outcome


def _outcome_of(
    name: str, arguments: StageArguments, log: SegmentLog, command_line: Sequence[str]
) -> StageOutcome:
    seat = take_seat()
    try:
        with strictness(arguments.is_strict):
            if is_script(arguments.experiment):
                return _script_stage(name, arguments, log)
            if seat is not None:
                return _outcome_of_rank(arguments, log, seat)
            return _experiment_stage(name, arguments, log, command_line)
    except NoticeCameError as error:
        return _preempted(error)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 the process boundary
        outcome = failed_outcome(error)
        if seat is None:
            _tell(error, outcome, arguments)
        return outcome


def _experiment_stage(
    name: str, arguments: StageArguments, log: SegmentLog, command_line: Sequence[str]
) -> StageOutcome:
    rehearse, resolved, hang_timeout_s = None, None, None
    if name == FIRST_STAGE:
        rehearse, resolved = rehearse_before_run, resolve_arguments(arguments)
        if resolved[0].distributed.strategy != "none":
            return _outcome_of_ranks(arguments, resolved, command_line)
        hang_timeout_s = resolved[0].train.hang_timeout_s
    with prepared_stage(arguments, rehearse, log, resolved, hang_timeout_s=hang_timeout_s) as stage:
        return _stage_function(name)(stage)


def _script_stage(name: str, arguments: StageArguments, log: SegmentLog) -> StageOutcome:
    from holdfast.training.own_loop import hosting

    if name == FIRST_STAGE:
        return hosting.run_script_segment(arguments, log)
    if name == REPORT_STAGE:
        return _stage_function(name)(hosting.reported_stage(arguments, log))
    return hosting.run_script_stage(arguments, _stage_function(name), log)


def _outcome_of_rank(arguments: StageArguments, log: SegmentLog, seat: Seat) -> StageOutcome:
    """This process is one of several that train together."""
    from holdfast.training.distributed.world import World
    from holdfast.training.machines.meeting import START
    from holdfast.training.ranks.segment import run_rank

    with World.joined(seat) as world:
        try:
            resolved = None
            if seat.is_guest:
                resolved = resolve_told(arguments, world.told(START)["config"])
            with prepared_stage(arguments, None, log, resolved, world) as stage:
                return run_rank(stage)
        except BaseException as error:
            world.tell_error(error)
            raise


def _outcome_of_ranks(
    arguments: StageArguments, resolved: Resolved, command_line: Sequence[str]
) -> StageOutcome:
    """Rehearse, have the segment done by several processes, and tell what ended it."""
    from holdfast.training.ranks.launching import run_in_ranks

    config = resolved[0]
    progress = Progress(arguments.progress_format, config.logging.every_s)
    if not arguments.run.run_json.exists():
        with PreemptionMonitor(build_sources(config.preemption)) as monitor:
            rehearse_before_run(arguments, config, monitor, progress)
    outcome = run_in_ranks(arguments, config, progress, command_line)
    tell_error(outcome)
    return outcome


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
    return found if name == FIRST_STAGE else partial(_once_whole, found)


def _once_whole(work: Callable[[Stage], StageOutcome], stage: Stage) -> StageOutcome:
    """Training begins with its newest checkpoint; what comes after it reads all of them."""
    if not await_all(stage.run, stage.should_stop):
        raise NoticeCameError(stage.monitor.notice)
    return work(stage)


def _tell(error: BaseException, outcome: StageOutcome, arguments: StageArguments) -> None:
    """The last line says it all. A traceback comes first, or the line says where it is."""
    assert outcome.error is not None
    line = str(error) if isinstance(error, HoldfastError) else described(error)
    record = _record_of(error, arguments.run) if isinstance(error, LoaderError) else None
    if record is not None:
        line += f"; the traceback is in {record}"
    elif isinstance(error, LoaderError) or not isinstance(error, HoldfastError):
        print(outcome.error["traceback"], file=sys.stderr, end="")
    print(error_line(line), file=sys.stderr)


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
