"""``python -m holdfast.training checkpoints``: list, verify or compare what training left.

What needs torch is imported when a command runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from holdfast.training.errors import HoldfastError
from holdfast.training.runs.directory import RunDirectory, read_run_record
from holdfast.training.runs.shown_text import shown
from holdfast.training.told_errors import told_errors

if TYPE_CHECKING:
    from holdfast.training.checkpointing.diff import Comparison
    from holdfast.training.checkpointing.inspection import Inspection

EXIT_FOUND = 1
EXIT_BAD_INPUT = 2
VERIFY_HINT = "; checkpoints verify says more"
PROGRESS_BYTES = 64 * 2**20

HELP = """List, verify or compare checkpoints. Nothing is changed; training may go on meanwhile.

\b
PLACE is a run (STORE/EXPERIMENT/RUN_ID), its checkpoints folder, or one checkpoint.
\b
Examples:
  python -m holdfast.training checkpoints list runs/digits/first
  python -m holdfast.training checkpoints verify runs/digits/first/checkpoints/step-00000420
  python -m holdfast.training checkpoints diff runs/digits/first runs/digits/second
"""
LIST_HELP = """Show step, epoch, kind, metrics, size and time of each checkpoint of PLACE.

The one that a resume begins with is marked as the latest: the newest of kind full. Checkpoints of
kind weights were slimmed: they can win, and not be resumed from. Damaged ones that a resume has
set aside are shown, too. Only manifests are read; verify reads all the rest.

\b
Examples:
  python -m holdfast.training checkpoints list runs/digits/first
  python -m holdfast.training checkpoints list runs/digits/first --json | jq '.[] | .metrics.loss'
"""
VERIFY_HELP = """Read every byte of each checkpoint of PLACE and compare it with its manifest.

One line each: good, or the file that is not, with what was expected and found. What a resume has
set aside is told, and is no fault of the run any more.

\b
Examples:
  python -m holdfast.training checkpoints verify runs/digits/first
  python -m holdfast.training checkpoints verify runs/digits/first --json | jq '.[] | .problem'
"""
DIFF_HELP = """Name what differs between the checkpoints A and B, and by how much.

Tensors of the model, the optimizer, the averages and the generators are compared bit by bit, then
counters, scheduler, history, metrics, configuration and library versions. When and by which
segment they were saved is no difference. Of a run, the latest checkpoint is taken. Where one is
of kind weights, what both have is compared.

\b
Examples:
  python -m holdfast.training checkpoints diff runs/digits/calm runs/digits/killed && echo exact
  python -m holdfast.training checkpoints diff runs/digits/a/checkpoints/step-00000340 \\
                                      runs/digits/b/checkpoints/step-00000340
  python -m holdfast.training checkpoints diff runs/digits/a runs/digits/b --json \\
      | jq '.differences[].name'
"""
LIST_EXIT_CODES = "Exit codes: 0 shown, 1 cannot be read, 2 wrong input."
VERIFY_EXIT_CODES = (
    "Exit codes: 0 all are good, 1 at least one is damaged or cannot be read, 2 wrong input."
)
DIFF_EXIT_CODES = (
    "Exit codes: 0 equal, 1 they differ, 2 wrong input, or a file that cannot be read."
)
PLACE_TYPE = click.Path(path_type=Path, resolve_path=True)
JSON_OPTION = click.option("--json", "is_json", is_flag=True, help="Print JSON, and nothing else.")


@click.group("checkpoints", help=HELP, short_help="List, verify or compare checkpoints.")
def checkpoints() -> None:
    """The group."""


@checkpoints.command(
    "list", help=LIST_HELP, epilog=LIST_EXIT_CODES, short_help="Steps, kinds, metrics and sizes."
)
@click.argument("place", type=PLACE_TYPE)
@JSON_OPTION
def list_command(place: Path, is_json: bool) -> None:
    """List."""
    with told_errors(hint=VERIFY_HINT):
        from holdfast.training.checkpointing.inspection import find_checkpoints, inspect

        found = inspect(find_checkpoints(place))
    if is_json:
        _print_json([seen.as_json() for seen in found])
    elif found:
        _print_table([_row(seen) for seen in found])
    else:
        click.echo(f"{place} has no checkpoints yet")


@checkpoints.command(
    "verify", help=VERIFY_HELP, epilog=VERIFY_EXIT_CODES, short_help="Read every byte again."
)
@click.argument("place", type=PLACE_TYPE)
@JSON_OPTION
def verify_command(place: Path, is_json: bool) -> None:
    """Verify."""
    with told_errors(hint=VERIFY_HINT):
        from holdfast.training.checkpointing.inspection import find_checkpoints, inspect, verify_all

        places = find_checkpoints(place)
        progress = _Progress(sum(seen.size_bytes for seen in inspect(places)))
        found = []
        for seen in verify_all(places, progress.add):
            found.append(seen)
            progress.clear()
            if not is_json:
                click.echo(shown(f"{seen.condition:<11}{seen.path.name}{_reason(seen)}"))
    if is_json:
        _print_json([seen.as_json() for seen in found])
    elif not found:
        click.echo(f"{place} has no checkpoints yet: there is nothing to verify")
    if any(seen.condition in ("damaged", "unreadable") for seen in found):
        sys.exit(EXIT_FOUND)


@checkpoints.command(
    "diff",
    help=DIFF_HELP,
    epilog=DIFF_EXIT_CODES,
    short_help="What differs between two checkpoints.",
)
@click.argument("a", type=PLACE_TYPE)
@click.argument("b", type=PLACE_TYPE)
@JSON_OPTION
def diff_command(a: Path, b: Path, is_json: bool) -> None:
    """Compare."""
    with told_errors(EXIT_BAD_INPUT, VERIFY_HINT):  # 1 says that they differ
        from holdfast.training.checkpointing.diff import compare
        from holdfast.training.checkpointing.inspection import the_checkpoint

        comparison = compare(the_checkpoint(a), the_checkpoint(b))
    if is_json:
        _print_json(comparison.as_json())
    else:
        for line in _told(comparison):
            click.echo(shown(line))
    if comparison.differences:
        sys.exit(EXIT_FOUND)


def _row(seen: Inspection) -> dict[str, str]:
    manifest = seen.manifest
    condition = "" if seen.condition == "good" else f"{seen.condition}: {seen.path.name}"
    if seen.error is not None:
        condition = f"{condition}; {seen.error}"
    return {
        "step": str(seen.step),
        _epochs_name(seen): str(manifest.epoch) if manifest else "",
        "kind": manifest.kind if manifest else "",
        "MiB": f"{seen.size_bytes / 2**20:.1f}",
        "created": manifest.created_at[:19].replace("T", " ") if manifest else "",
        "metrics": _metrics(manifest.metrics) if manifest else "",
        "state": "latest" if seen.is_latest else condition,
    }


def _epochs_name(seen: Inspection) -> str:
    """What the number counts: of a script's run, how often it has validated."""
    try:
        record = read_run_record(RunDirectory(seen.path.parent.parent))
    except (FileNotFoundError, HoldfastError):
        return "epoch"
    return "epoch" if record.script is None else "validations"


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _print_table(rows: Sequence[dict[str, str]]) -> None:
    lines = [{name: shown(cell) for name, cell in row.items()} for row in rows]
    lines.insert(0, {name: name for name in rows[0]})
    widths = {name: max(len(line[name]) for line in lines) for name in rows[0]}
    for line in lines:
        click.echo("  ".join(line[name].ljust(widths[name]) for name in widths).rstrip())


def _reason(seen: Inspection) -> str:
    if seen.error is not None:
        return f"  {seen.error}"
    if seen.condition == "set aside":
        return "  its bytes are good: it can be renamed back"
    assert seen.manifest is not None
    return f"  {seen.manifest.kind}, {seen.size_bytes / 2**20:.1f} MiB"


def _told(comparison: Comparison) -> Iterator[str]:
    by_section: dict[str, list[str]] = {}
    for difference in comparison.differences:
        by_section.setdefault(difference.section, []).append(str(difference))
    total = _tensors(comparison.num_tensors)
    if by_section:
        yield f"A  {comparison.a}"
        yield f"B  {comparison.b}"
    else:
        yield f"equal: {total}, and all of {', '.join(comparison.values)}"
    for section, lines in by_section.items():
        yield f"{section}: {len(lines)} differ"
        yield from (f"  {line}" for line in lines)
    if comparison.not_compared:
        yield (f"not compared, as of kind weights: {', '.join(comparison.not_compared)}")
    if by_section:
        yield f"differences: {len(comparison.differences)}; compared: {total}"


def _tensors(num_tensors: Counter[str]) -> str:
    parts = ", ".join(f"{section} {number}" for section, number in num_tensors.items())
    return f"{num_tensors.total()} tensors ({parts})"


def _print_json(value: Any) -> None:
    from holdfast.training.runs.durable_json import without_nan

    click.echo(json.dumps(without_nan(value), indent=2, ensure_ascii=False))


class _Progress:
    """How much is read, on a terminal, where there is much to read."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._num_bytes = 0
        self._is_shown = total_bytes >= PROGRESS_BYTES and sys.stderr.isatty()

    def add(self, num_bytes: int) -> None:
        """So many more bytes are read."""
        self._num_bytes += num_bytes
        if self._is_shown:
            done, total = (size / 2**20 for size in (self._num_bytes, self._total_bytes))
            click.echo(f"\r{done:.0f} of {total:.0f} MiB read", err=True, nl=False)

    def clear(self) -> None:
        """Make room for a line."""
        if self._is_shown:
            click.echo("\r\x1b[K", err=True, nl=False)
