"""From the configuration to the ranks of a segment, and from how they ended to one outcome."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import Any

from holdfast.training.checkpointing.manifest import verify
from holdfast.training.configuration.loading import config_digest
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.distributed.launcher import Ended, RankEnd, run_ranks
from holdfast.training.errors import HoldfastError, RankLostError
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.runs.directory import read_run_record, read_segments
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.progress import Progress
from holdfast.training.stage import EXIT_PREEMPTED, StageArguments, StageOutcome, failed_outcome

NUM_SHOWN_LINES = 40


def run_in_ranks(
    arguments: StageArguments, config: RunConfig, progress: Progress, command_line: Sequence[str]
) -> StageOutcome:
    """Have a segment done by the configured number of processes; the outcome is that of all.

    ``command_line`` are the arguments of this process, which each rank gets, too.
    """
    step = finished_step(arguments.run, config)
    if step is not None:
        path = str(arguments.run.checkpoint(step))
        progress.emit("restored", step=step, path=path)
        return StageOutcome("completed", 0, step=step)
    size = config.distributed.num_processes
    ended = run_ranks(
        size,
        python_command("holdfast.training", *command_line),
        child_environment(_num_threads(arguments, config)),
        arguments.folder,
        config.distributed.hang_timeout_s,
        on_started=lambda pids: progress.emit("ranks", pids=[*pids]),
    )
    return outcome_of(ended, config.distributed.hang_timeout_s)


def finished_step(run: RunDirectory, config: RunConfig) -> int | None:
    """The last step of a run that has ended with this configuration, and need not be started.

    Its last checkpoint was verified. None where anything of it is missing or otherwise: then the
    ranks find out.
    """
    try:
        newest = read_segments(run)[-1]
        is_same = read_run_record(run).config_digest == config_digest(config)
        if newest.outcome != "completed" or not is_same:
            return None
        return verify(run.checkpoint(newest.end_step)).step
    except (IndexError, FileNotFoundError, HoldfastError):
        return None


def outcome_of(ended: Ended, hang_timeout_s: float) -> StageOutcome:
    """One outcome for all ranks: rank 0's where all went well, else that of who failed first."""
    if ended.hung_s is not None:
        _show_logs(ended.ranks)
        return failed_outcome(
            RankLostError(
                f"nothing new has happened for {ended.hung_s:.0f} s in {len(ended.ranks)} "
                f"processes, more than distributed.hang_timeout_s={hang_timeout_s:g} allows: all "
                f"were killed, where each stood is above; go on by running the same command again"
            )
        )
    first = _first_failed(ended)
    if first is not None:
        if first.rank > 0:
            _show_logs([first])
        return _failed(first)
    outcome = ended.ranks[0].outcome
    code = ended.ranks[0].exit_code
    if outcome is None:
        return StageOutcome("preempted" if code == EXIT_PREEMPTED else "completed", code)
    return StageOutcome(**outcome)


def _first_failed(ended: Ended) -> RankEnd | None:
    """Whose end was the reason for all others': one that says why, or that a signal ended."""
    failed = [end for end in ended.ranks if end.exit_code not in (0, EXIT_PREEMPTED)]
    reasons = [end for end in failed if not end.is_killed and not _is_consequence(end)]
    earliest = [end for end in reasons if end.rank == ended.first_failed]
    return next(iter([*earliest, *reasons, *failed]), None)


def _is_consequence(end: RankEnd) -> bool:
    error = _error(end)
    return error is not None and error.get("type") == RankLostError.__name__


def _failed(end: RankEnd) -> StageOutcome:
    error = _error(end)
    if error is None:
        how = f"exit code {end.exit_code}"
        if end.exit_code < 0:
            how = signal.Signals(-end.exit_code).name
        return failed_outcome(
            RankLostError(
                f"rank {end.rank} (process {end.pid}) was ended by {how}, and all others were ended"
                f"{_hint(end.exit_code)}; go on by running the same command again"
            )
        )
    prefix = f"rank {end.rank}: " if end.rank else ""
    message = f"{prefix}{error['message']}"
    assert end.outcome is not None
    told = StageOutcome(**end.outcome)
    return dataclasses.replace(told, error={**error, "message": message})


def _hint(exit_code: int) -> str:
    return ": often the machine is short of memory" if exit_code == -signal.SIGKILL else ""


def _error(end: RankEnd) -> Any:
    return None if end.outcome is None else end.outcome.get("error")


def _show_logs(ends: Sequence[RankEnd]) -> None:
    """The last lines of what ranks said whose log is not this one."""
    for end in ends:
        for line in end.tail[-NUM_SHOWN_LINES:]:
            print(f"[rank {end.rank}] {line}", file=sys.stderr)


def _num_threads(arguments: StageArguments, config: RunConfig) -> int:
    """Threads of each rank: as configured or as recorded, else its part of the cores.

    With shards, that of a shard: the number must not depend on how many processes there are.
    """
    if config.train.num_threads is not None:
        return config.train.num_threads
    try:
        recorded = read_run_record(arguments.run).num_threads
    except (FileNotFoundError, HoldfastError):
        recorded = None
    return recorded or max(1, arguments.num_threads // config.distributed.num_parts)
