"""From the configuration to the ranks of a segment, and from how they ended to one outcome."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.training.checkpointing.manifest import verify
from holdfast.training.configuration.loading import config_digest
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.distributed.launcher import Ended, Place, RankEnd, place_of_all, run_ranks
from holdfast.training.distributed.stopping import NEWCOMER_CAME
from holdfast.training.errors import HoldfastError, MachineLostError, RankLostError
from holdfast.training.exactness.reproducibility import python_command
from holdfast.training.machines.meeting import Meeting, opened_meeting
from holdfast.training.machines.note import note_trained
from holdfast.training.preemption.notices import PreemptionMonitor
from holdfast.training.preemption.signals import current_signal_flag
from holdfast.training.preemption.sources import build_sources
from holdfast.training.ranks.gpus import environments_of_ranks
from holdfast.training.runs.directory import read_run_record, read_segments
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.progress import Progress
from holdfast.training.runs.stored_json import read_json
from holdfast.training.stage import (
    EXIT_PREEMPTED,
    NoticeCameError,
    StageArguments,
    StageOutcome,
    failed_outcome,
)

NUM_SHOWN_LINES = 40
CONSEQUENCES = (RankLostError.__name__, MachineLostError.__name__)
"""What a rank ends with because of another one."""


def run_in_ranks(
    arguments: StageArguments, config: RunConfig, progress: Progress, command_line: Sequence[str]
) -> StageOutcome:
    """Have a segment done by the configured number of processes; the outcome is that of all.

    ``command_line`` are the arguments of this process, which each rank here gets, too. Raises
    InputError where other machines cannot come to this one or GPUs are too few, NoticeCameError
    where a notice comes before enough machines are there, and StorageError.
    """
    step = finished_step(arguments.run, config)
    if step is not None:
        path = str(arguments.run.checkpoint(step))
        progress.emit("restored", step=step, path=path)
        if config.distributed.max_machines > 1:
            note_trained(arguments.run)
        return StageOutcome("completed", 0, step=step)
    num_threads, distributed = _num_threads(arguments, config), config.distributed
    environments = environments_of_ranks(
        distributed.num_processes, num_threads, config.train.device
    )

    def run_here(place: Place) -> Ended:
        return run_ranks(
            place,
            python_command("holdfast.training", *command_line),
            environments,
            arguments.folder,
            distributed.hang_timeout_s,
            on_started=lambda pids: progress.emit("ranks", pids=[*pids]),
        )

    if distributed.max_machines == 1:
        with place_of_all(distributed.num_processes) as place:
            return outcome_of(run_here(place), distributed.hang_timeout_s)
    with opened_meeting(arguments.run, arguments.experiment, distributed) as meeting:
        _gather(meeting, arguments.run, config)
        place = meeting.begin(told_to_guests(arguments, config, num_threads))
        outcome = outcome_of(
            _ended_everywhere(meeting, run_here(place)), distributed.hang_timeout_s
        )
        meeting.state = "completed" if outcome.outcome == "completed" else "away"
        return outcome


def _has_stopped_for_newcomer(run: RunDirectory) -> bool:
    segments = read_segments(run)
    return bool(segments) and (segments[-1].notice or {}).get("source") == NEWCOMER_CAME


def _gather(meeting: Meeting, run: RunDirectory, config: RunConfig) -> None:
    is_expecting = _has_stopped_for_newcomer(run)
    with PreemptionMonitor(build_sources(config.preemption)) as monitor:
        if not meeting.gather(lambda: monitor.notice is not None, is_expecting=is_expecting):
            raise NoticeCameError(monitor.notice)


def told_to_guests(
    arguments: StageArguments, config: RunConfig, num_threads: int
) -> dict[str, Any]:
    """What other machines start their ranks with; they have no command line of their own."""
    run = arguments.run
    return {
        "config": config.model_dump(mode="json"),
        "record": read_json(run.run_json) if run.run_json.exists() else None,
        "num_threads": num_threads,
        "hang_timeout_s": config.distributed.hang_timeout_s,
        "flags": [
            *(["--strict"] if arguments.is_strict else []),
            *(["--allow-mismatch"] if arguments.should_allow_mismatch else []),
        ],
    }


def _ended_everywhere(meeting: Meeting, here: Ended) -> Ended:
    """How the ranks of all machines have ended; returns once they have."""
    reports, lost = meeting.reports(here)
    others = [ended_from(report) for report in reports]
    return dataclasses.replace(
        here,
        ranks=(*here.ranks, *(end for ended in others for end in ended.ranks)),
        hung_s=next((e.hung_s for e in (here, *others) if e.hung_s is not None), None),
        lost=here.lost or lost,
    )


def as_report(ended: Ended) -> dict[str, Any]:
    """What a machine tells of the end of its ranks."""
    report = dataclasses.asdict(ended)
    for rank in report["ranks"]:
        rank["tail"] = rank["tail"][-NUM_SHOWN_LINES:]
    return report


def ended_from(report: Mapping[str, Any]) -> Ended:
    """What another machine has told."""
    ranks = (RankEnd(**{**rank, "tail": tuple(rank["tail"])}) for rank in report["ranks"])
    return Ended(**{**report, "ranks": tuple(ranks)})


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
        if ended.lost is not None and (first.is_killed or _is_consequence(first)):
            told = f"{ended.lost}; go on with the others by running the same command again"
            return failed_outcome(MachineLostError(told))
        if first.rank > 0:
            _show_logs([first])
        return _failed(first)
    outcome = ended.ranks[0].outcome
    code = ended.ranks[0].exit_code
    if outcome is None:
        return StageOutcome("preempted" if code == EXIT_PREEMPTED else "completed", code)
    return dataclasses.replace(StageOutcome(**outcome), should_start_again=_has_grown(outcome))


def _has_grown(outcome: Mapping[str, Any]) -> bool:
    """Whether all have stopped for a machine that has come, and for nothing else."""
    source = (outcome.get("notice") or {}).get("source")
    return source == NEWCOMER_CAME and current_signal_flag().first is None


def _first_failed(ended: Ended) -> RankEnd | None:
    """Whose end was the reason for all others': one that says why, or that a signal ended."""
    failed = [end for end in ended.ranks if end.exit_code not in (0, EXIT_PREEMPTED)]
    reasons = [end for end in failed if not end.is_killed and not _is_consequence(end)]
    earliest = [end for end in reasons if end.rank == ended.first_failed]
    return next(iter([*earliest, *reasons, *failed]), None)


def _is_consequence(end: RankEnd) -> bool:
    error = _error(end)
    return error is not None and error.get("type") in CONSEQUENCES


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
