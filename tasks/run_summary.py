"""What a run's directory says about the run: for the command line and for Prefect's artifacts.

Reads JSON only, and takes a run at any moment of its life: whatever is not there yet is None.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from holdfast.training.bundles.summary import promotion_fields, promotion_line, published_name
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import DataFormatError, StorageError
from holdfast.training.experiment.loading import located_reference
from holdfast.training.runs.directory import (
    RunDirectory,
    Script,
    SegmentRecord,
    ledger_outcome,
    parse_step,
    read_run_record,
    read_segments,
    segments_among,
)
from holdfast.training.runs.lease_view import (
    LeaseView,
    generation_path,
    lease_at,
    newest_among,
    read_lease,
)
from holdfast.training.runs.ledger import ledger
from holdfast.training.runs.losses import loss_file, with_ends, with_known_ends
from holdfast.training.runs.stored_json import (
    RECORD,
    STATE,
    Limits,
    is_kind,
    parse_json,
    read_json,
)
from holdfast.training.storage.address import Address
from holdfast.training.tiers.listing import ListedRun
from holdfast.training.tiers.scratch import run_name, told_path, told_store
from holdfast.training.tiers.viewing import has_report

State = Literal["new", "training", "preempted", "failed", "killed", "trained", "completed"]


@dataclass(frozen=True)
class RunSummary:
    """One run, as far as it has come.

    Attributes:
        name: ``experiment/run_id``.
        state: ``training`` while its lease is held; ``trained`` when the last segment completed;
            ``completed`` once the bundle is published; otherwise how its last segment ended.
        step: steps that are done, as told by the newest segment or checkpoint.
        num_segments, num_preemptions, num_crashes: process lives so far, and how they ended.
        holder: who is writing it now.
        champion: name of the weights that won, once they have been chosen.
        test_metrics: the champion's metrics on test data.
        published: ``name@version`` in the registry.
        promotion: whether it became the champion of its name, and why.
        ledger_s: seconds by what they went to, over all segments, as ``ledger.py`` has them.
        goodput: useful training time divided by all time that was paid for.
        num_repeated_steps: steps that a later segment did again, as far as records tell.
        error: why the last segment failed.
        num_processes: of the last segment, where it trained by a strategy.
        widths: the same of each segment that did.
        machines: on how many machines; empty where it was never more than one.
    """

    name: str
    path: str
    state: State
    step: int
    num_segments: int
    num_preemptions: int
    num_crashes: int
    holder: str | None
    champion: str | None
    test_metrics: dict[str, float]
    published: str | None
    promotion: str | None
    ledger_s: dict[str, float]
    goodput: float | None
    num_repeated_steps: int
    bundle: str | None
    report: str | None
    error: str | None
    num_processes: int | None = None
    widths: tuple[int, ...] = ()
    machines: tuple[int, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return dict(vars(self))


@dataclass(frozen=True)
class _Found:
    """What a summary is made of, from wherever it was read.

    Attributes:
        place: of the run, as people are told it.
        newest_checkpoint: its step; 0 where there is none.
    """

    name: str
    place: str
    segments: list[SegmentRecord]
    lease: LeaseView | None
    evaluation: Any
    promotion: dict[str, Any] | None
    newest_checkpoint: int
    has_bundle: bool
    has_report: bool


def summarize(run: RunDirectory) -> RunSummary:
    """Read a run. Raises DataFormatError or StorageError where a file of it is not readable."""
    found = _Found(
        name=f"{run.path.parent.name}/{run.path.name}",
        place=told_path(run.path),
        segments=with_known_ends(read_segments(run), run),
        lease=read_lease(run),
        evaluation=read_optional(run.evaluation_json),
        promotion=read_promotion(run),
        newest_checkpoint=max(checkpoint_steps(run), default=0),
        has_bundle=run.bundle.is_dir(),
        has_report=has_report(run),
    )
    return _summary(found)


def summarize_listed(listed: ListedRun, address: Address) -> RunSummary:
    """The same of a run of a bucket's list. Raises DataFormatError as ``summarize`` does."""
    if listed.problem:
        raise DataFormatError(listed.problem)
    run = RunDirectory(Path(listed.name))

    def read(path: Path) -> Json:
        name = path.relative_to(run.path).as_posix()
        return parse_json(listed.texts[name].encode(), f"{address}/{path}")

    def read_if_there(path: Path) -> Json:
        return read(path) if path.relative_to(run.path).as_posix() in listed.texts else None

    losses = [loss_file(run.losses / name, size) for name, size in listed.sizes_in("losses")]
    segments = segments_among(listed.names_in("segments"), run, read)
    generation = newest_among(listed.names_in("lease"))
    lease = generation_path(run, generation)
    promotion = read_if_there(run.promotion_json)
    steps = map(parse_step, listed.names_in("checkpoints"))
    found = _Found(
        name=listed.name,
        place=f"{address}/{listed.name}",
        segments=with_ends(segments, filter(None, losses)),
        lease=lease_at(lease, read, listed.renewed_s) if generation else None,
        evaluation=read_if_there(run.evaluation_json),
        promotion=None if promotion is None else promotion_fields(promotion, run.promotion_json),
        newest_checkpoint=max((step for step in steps if step is not None), default=0),
        has_bundle=bool(listed.names_in(run.bundle.name)),
        has_report=run.report_html.name in listed.sizes,
    )
    return _summary(found)


def _summary(found: _Found) -> RunSummary:
    segments, evaluation, promotion = found.segments, found.evaluation, found.promotion
    lease = found.lease if found.lease is not None and found.lease.status == "held" else None
    outcomes = [
        ledger_outcome(record, is_alive=lease is not None and record is segments[-1])
        for record in segments
    ]
    account = ledger(segments)
    return RunSummary(
        name=found.name,
        path=found.place,
        state=_state(found, outcomes),
        step=max([record.end_step for record in segments] + [found.newest_checkpoint]),
        num_segments=len(segments),
        num_preemptions=outcomes.count("preempted"),
        num_crashes=outcomes.count("failed") + outcomes.count("killed"),
        holder=lease.holder if lease is not None else None,
        champion=champion_name(evaluation),
        test_metrics=test_metrics(evaluation),
        published=published_name(promotion) if promotion else None,
        promotion=promotion_line(promotion) if promotion else None,
        ledger_s={
            name.removesuffix("_s"): round(seconds, 3)
            for name, seconds in vars(account).items()
            if name.endswith("_s")
        },
        goodput=account.goodput if account.paid_s > 0 else None,
        num_repeated_steps=account.num_recomputed_steps,
        bundle=f"{found.place}/bundle" if found.has_bundle else None,
        report=f"{found.place}/report.html" if found.has_report else None,
        error=segments[-1].error.message if segments and segments[-1].error else None,
        num_processes=segments[-1].num_processes if segments else None,
        widths=tuple(record.num_processes for record in segments if record.num_processes),
        machines=_machines(segments),
    )


def _machines(segments: Sequence[SegmentRecord]) -> tuple[int, ...]:
    if not any(record.num_machines for record in segments):
        return ()
    return tuple(record.num_machines or 1 for record in segments)


def experiment_reference(run: RunDirectory) -> str:
    """How the run's experiment was named when the run was begun.

    A file that is not found from here is named by where it was found from then. The run of a
    script is named by its folder and the script.
    """
    record = read_run_record(run)
    if record.script is not None:
        return f"{run.path.absolute().parent.name}={record.script.path}"
    return located_reference(record.experiment, record.folder)


def script_command_line(script: Script) -> str:
    """What starts a script again."""
    return f"holdfast exec {shlex.join([script.path, *script.arguments])}"


def history_of(run: RunDirectory) -> list[dict[str, Any]]:
    """One entry per finished epoch, from the newest checkpoint; empty where there is none."""
    for step in sorted(checkpoint_steps(run), reverse=True):
        state = read_optional(run.checkpoint(step) / "state.json", STATE)
        if isinstance(state, dict) and isinstance(state.get("history"), list):
            return list(state["history"])
    return []


def checkpoint_steps(run: RunDirectory) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    try:
        names = [path.name for path in run.checkpoints.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"cannot list {run.checkpoints}: {error.strerror}") from error
    return sorted(step for step in map(parse_step, names) if step is not None)


def read_optional(path: Path, limits: Limits = RECORD) -> Any:
    """The JSON of a file; None where there is no such file."""
    try:
        return read_json(path, limits)
    except FileNotFoundError:
        return None


def read_promotion(run: RunDirectory) -> dict[str, Any] | None:
    """What became of the run's bundle; None where nothing was decided yet."""
    found = read_optional(run.promotion_json)
    return None if found is None else promotion_fields(found, run.promotion_json)


def champion_name(evaluation: Any) -> str | None:
    """Name of the champion in ``evaluation.json``."""
    champion = evaluation.get("champion") if isinstance(evaluation, dict) else None
    name = champion.get("name") if isinstance(champion, dict) else champion
    return name if isinstance(name, str) else None


def test_metrics(evaluation: Any) -> dict[str, float]:
    """The champion's metrics on test data in ``evaluation.json``."""
    test = evaluation.get("test") if isinstance(evaluation, dict) else None
    metrics = test.get("metrics") if isinstance(test, dict) else None
    return numbers_in(metrics)


def numbers_in(values: Any) -> dict[str, float]:
    """The entries of a mapping that are numbers."""
    if not isinstance(values, dict):
        return {}
    return {name: float(v) for name, v in values.items() if is_kind(v, (float,))}


def _state(found: _Found, outcomes: list[Any]) -> State:
    if found.has_bundle:
        return "completed"
    if found.lease is not None and found.lease.status == "held":
        return "training"
    if not outcomes:
        return "new"
    last: State = "trained" if outcomes[-1] == "completed" else outcomes[-1]
    return last


def reading_command(run: RunDirectory) -> str:
    """What brings the report of a run in a bucket onto a machine, and says where it is."""
    return f"holdfast report {run_name(run)} --read --store {told_store(run.path.parent.parent)}"
