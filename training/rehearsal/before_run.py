"""The rehearsal that a run begins with: before ``run.json``, before the real model is built."""

from __future__ import annotations

import logging
import sys

from holdfast.training.configuration.schema import RunConfig
from holdfast.training.preemption.notices import PreemptionMonitor
from holdfast.training.rehearsal.asking import Asked, rehearse
from holdfast.training.rehearsal.findings import Report, error_of, lines
from holdfast.training.rehearsal.request import resolved_depth
from holdfast.training.runs.progress import Progress
from holdfast.training.stage import NoticeCameError, StageArguments

logger = logging.getLogger(__name__)


def rehearse_before_run(
    arguments: StageArguments, config: RunConfig, monitor: PreemptionMonitor, progress: Progress
) -> None:
    """Rehearse, and tell what was found.

    Raises:
        RehearsalError: the experiment is not fit; nothing was written.
        RehearsalFailedError: the rehearsal failed for a reason that may be gone the next time.
        NoticeCameError: a notice came first; the rehearsal was ended.
    """
    depth = resolved_depth(config.rehearsal.depth)
    if depth == "none":
        return
    asked = Asked(
        arguments.experiment,
        arguments.store,
        arguments.num_threads,
        arguments.config_file,
        arguments.overrides,
        depth,
    )

    def on_act(act: str, number: int, total: int) -> None:
        progress.emit("rehearsing", stage="rehearsal", done=number, total=total, message=act)

    report = rehearse(asked, lambda: monitor.notice is not None, on_act)
    if report is None:
        raise NoticeCameError(monitor.notice)
    error, is_strict = error_of(report, is_strict=arguments.is_strict), arguments.is_strict
    _tell(report, progress, len(report.errors(is_strict=is_strict)) == 1)
    if error is not None:
        raise error


def _tell(report: Report, progress: Progress, is_one_raised: bool) -> None:
    """Findings as events for programs, as lines of the log for people.

    One that is raised alone is told by who catches it.
    """
    for finding in report.findings:
        if finding.traceback:
            print(finding.traceback, file=sys.stderr, end="")
    for line in lines(report):
        level = "warning" if line.startswith(("error", "warning")) else "info"
        if is_one_raised and line.startswith("error"):
            continue
        message = f"rehearsal: {line}"
        if progress.format == "jsonl":
            progress.emit("log", stage="rehearsal", level=level, message=message)
        elif progress.format == "text":
            logger.log(logging.WARNING if level == "warning" else logging.INFO, "%s", message)
    progress.emit("rehearsal", duration_s=report.duration_s, num_findings=len(report.findings))
