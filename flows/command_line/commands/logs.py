"""``holdfast logs``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from holdfast.flows.command_line.options import EXIT_CODES, STORE_OPTION
from holdfast.flows.command_line.stores import find_run, reading_store
from holdfast.training.errors import InputError
from holdfast.training.runs.directory import RunDirectory, next_segment_number, read_segments
from holdfast.training.runs.lease import read_lease
from holdfast.training.runs.segment_log import log_path
from holdfast.training.tiers.scratch import told_path
from holdfast.training.tiers.viewing import viewed

LOOK_EVERY_S = 0.5

HELP = """Show what a run's segment wrote to standard error: its log, warnings and errors.

RUN is a run id, experiment/run_id, or the run's directory. Each segment has a log of its own, of a
megabyte at most: a longer one keeps its beginning and its end. With --follow, what is added is
shown until the run is completed or nobody writes it; a segment on another machine is followed, too.

\b
Examples:
  holdfast logs short                        the newest segment
  holdfast logs short --segment 3
  holdfast logs turbofan/fd001 -f --store /mnt/runs
"""


@click.command("logs", help=HELP, epilog=EXIT_CODES, short_help="Show what a run's segments said.")
@click.argument("run")
@click.option("--segment", type=click.IntRange(min=1), help="Its number; the newest unless named.")
@click.option("--follow", "-f", "should_follow", is_flag=True, help="Show what is added.")
@STORE_OPTION
def command(run: str, segment: int | None, should_follow: bool, store: str) -> None:
    """Show."""
    directory = find_run(reading_store(store, run), run)
    number = segment or next_segment_number(directory) - 1
    path = log_path(directory.logs, number)
    if not path.is_file() and not should_follow:
        raise InputError(
            f"{told_path(directory.path)} has no log of segment {number}; {_known(directory)}"
        )
    reader = _Reader(path)
    reader.show()
    while should_follow:
        viewed(directory)
        is_over = not _is_written(directory)
        reader.show()
        newest = next_segment_number(directory) - 1
        if segment is None and newest > number:
            number = newest
            reader = _Reader(log_path(directory.logs, number))
        elif is_over:
            return
        time.sleep(LOOK_EVERY_S)


class _Reader:
    """Shows what a file has gained since last time; from its start where it was shortened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def show(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        if len(content) < self._position:
            click.echo(f"[... {self._path.name} was shortened ...]", err=True)
            self._position = len(content) // 2
        sys.stdout.buffer.write(content[self._position :])
        sys.stdout.buffer.flush()
        self._position = len(content)


def _is_written(run: RunDirectory) -> bool:
    lease = read_lease(run)
    return lease is not None and not lease.is_expired


def _known(run: RunDirectory) -> str:
    kept = [record.number for record in read_segments(run) if _has_log(run, record.number)]
    return f"there are logs of segments {kept}" if kept else "it was made before there were logs"


def _has_log(run: RunDirectory, number: int) -> bool:
    return log_path(run.logs, number).is_file()
