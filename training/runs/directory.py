"""The run directory: the single source of truth about a run.

``run.json`` is written once. Each segment owns one record in ``segments/`` and rewrites it while
it lives. A segment that was killed leaves a record that says ``running``; ``ledger_outcome`` tells
what that means. All of it is readable without torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from holdfast.training.configuration.loading import (
    config_from_record,
    digested_values,
    is_choice_only,
)
from holdfast.training.configuration.schema import Json
from holdfast.training.errors import (
    ConfigError,
    DataFormatError,
    MachineLostError,
    RunConflictError,
    StorageError,
)
from holdfast.training.runs.durable_json import create_json_durably, write_json_durably
from holdfast.training.runs.paths import RunDirectory, parse_step, validate_run_id
from holdfast.training.runs.stored_json import read_json

__all__ = [
    "FORMAT_VERSION",
    "LedgerOutcome",
    "Lineage",
    "RunDirectory",
    "RunRecord",
    "Script",
    "SegmentError",
    "SegmentRecord",
    "ledger_outcome",
    "next_segment_number",
    "parse_step",
    "read_json",
    "read_run_record",
    "read_segments",
    "run_identity",
    "segment_duration_s",
    "segments_among",
    "utc_now",
    "validate_run_id",
    "write_json_durably",
    "write_run_record_once",
    "write_segment",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MAX_DIFFERENCES_SHOWN = 10
Outcome = Literal["running", "completed", "preempted", "failed"]
LedgerOutcome = Literal["running", "completed", "preempted", "failed", "killed"]
ABSENT = "(absent)"
OPTIMIZER_ARGS = "optimizer.args."
WIDTHS = ("distributed.num_processes", "distributed.max_machines")
SELDOM = ("weight_files", "lineage", "script", "taken_over")


class Record(BaseModel):
    """A value that is read from and written to the run directory."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


RecordT = TypeVar("RecordT", bound=Record)
MAX_SECONDS = 1e10  # three hundred years
MAX_STEP = 10**15
SEGMENT_NAME = re.compile(r"([0-9]{4,9})\.json")


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("it names no time zone")
    return text


Moment = Annotated[str, AfterValidator(_moment)]
"""ISO 8601, UTC."""
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Step = Annotated[int, Field(ge=0, le=MAX_STEP)]


class Script(Record):
    """The program whose own loop a run is."""

    path: str
    """Absolute."""
    arguments: list[str]
    overrides: list[str] = Field(default_factory=list)
    """What `--set` said of the script's settings; absent for nothing."""

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = write(self)
        return {name: value for name, value in fields.items() if value or name != "overrides"}


class Lineage(Record):
    """Where a forked run comes from."""

    run: str
    """The run that it was forked from, as ``run_identity`` names it."""
    run_id: str
    step: Step
    """Of the checkpoint that it begins with."""
    manifest_digest: str
    """Of that checkpoint's manifest, as it was in the other run."""
    changed: dict[str, Any] = Field(default_factory=dict)
    """Keys of the configuration that differ from the other run's, with their values here."""

    @property
    def changed_options(self) -> frozenset[str]:
        """Arguments of the optimizer that differ from the other run's."""
        keys = (key for key in self.changed if key.startswith(OPTIMIZER_ARGS))
        return frozenset(key.removeprefix(OPTIMIZER_ARGS) for key in keys)

    @property
    def has_new_rates(self) -> bool:
        """Whether warm-up and scheduler begin anew with the fork."""
        is_new = any(key.startswith(("scheduler.", "warmup.")) for key in self.changed)
        return is_new or "lr" in self.changed_options


class TakenOver(Record):
    """An earlier configuration of a script's run, which went on with another one."""

    segment: int = Field(ge=1)
    """The first segment that had the next one."""
    step: Step
    """Steps that were done by then, and count."""
    at: Moment
    config_digest: str
    """Of the earlier configuration."""
    changed: dict[str, Any]
    """Keys that had other values, with those; `(absent)` for none."""


class RunRecord(Record):
    """What a run is; the content of ``run.json``."""

    format_version: int = FORMAT_VERSION
    run_id: str
    experiment: str
    config: dict[str, Any]
    """The resolved configuration."""
    config_digest: str
    seeds: dict[str, int] = Field(default_factory=dict)
    data_fingerprint: str | None = None
    experiment_digest: str | None = None
    """Of the experiment's code, as ``source_digest`` has it; None where there is no file."""
    versions: dict[str, str] = Field(default_factory=dict)
    num_threads: int | None = None
    surroundings: dict[str, Any] = Field(default_factory=dict)
    """Installed packages, memory, GPU, git commit: to look for reasons in. Never compared."""
    created_at: Moment
    folder: str | None = None
    """Where the program was started; what is relative in the record was relative to it."""
    script: Script | None = None
    """Of an own loop; absent for an experiment."""

    weight_files: dict[str, str] = Field(default_factory=dict)
    """Digests of what the weights begin with: `initial_weights`, and the experiment's `base`."""
    lineage: Lineage | None = None
    """Of a fork."""
    taken_over: list[TakenOver] = Field(default_factory=list)
    """Configurations that a script's run had before, the oldest first; absent for none."""

    @property
    def config_digests(self) -> frozenset[str]:
        """Of all configurations that the run has had."""
        return frozenset((self.config_digest, *(one.config_digest for one in self.taken_over)))

    def first_comparable(self, segment: int) -> int:
        """The first segment that had the configuration which ``segment`` has."""
        begun = (one.segment for one in self.taken_over if one.segment <= segment)
        return max(begun, default=1)

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Runs that begin as usual have the records that they always had."""
        fields: dict[str, Any] = write(self)
        return {name: value for name, value in fields.items() if value or name not in SELDOM}


class SegmentError(Record):
    """Why a segment failed."""

    type: str
    message: str
    traceback: str = ""
    exit_code: int = 1


class SegmentRecord(Record):
    """One process life of a run; the content of ``segments/<number>.json``."""

    format_version: int = FORMAT_VERSION
    number: int = Field(ge=1)
    started_at: Moment
    ended_at: Moment | None = None
    outcome: Outcome = "running"
    start_step: Step = 0
    end_step: Step = 0
    notice: dict[str, Any] | None = None
    """Source, reason and seconds left, where a notice ended the segment."""
    error: SegmentError | None = None
    costs_s: dict[str, Seconds] = Field(default_factory=dict)
    """Seconds by what they went to: startup, restore, useful, recomputed, saving, evaluating."""
    save_s: dict[str, Seconds] = Field(default_factory=dict)
    """Summary of the measured cost of a save."""
    host: str
    pid: int
    versions: dict[str, str] = Field(default_factory=dict)
    num_processes: int | None = Field(None, ge=1)
    """How many trained together; absent where there was one, without a strategy."""
    num_machines: int | None = Field(None, ge=1)
    """On how many machines; absent where it was one."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_used(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Segments of one process have the records that they always had."""
        fields: dict[str, Any] = write(self)
        unused = {key for key in ("num_processes", "num_machines") if fields[key] is None}
        return {key: value for key, value in fields.items() if key not in unused}


def utc_now() -> str:
    """The time as records write it, e.g. ``2026-01-31T12:00:00.123456Z``."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def write_run_record_once(
    run: RunDirectory, record: RunRecord, *, is_mismatch_allowed: bool = False
) -> RunRecord:
    """Write ``run.json``, or return the one that is there if it describes the same run.

    Of several processes at once, one writes and all others get what it wrote. Where a mismatch is
    allowed, what is there is returned as it is.

    Raises:
        RunConflictError: the run id belongs to a run with another configuration or other data;
            the message names each differing key with both values.
        StorageError: it can neither be written nor read.
    """
    _make_folder(run)
    if create_json_durably(run.run_json, record.model_dump(mode="json")):
        return record
    existing = read_run_record(run)
    differing = list(conflicts(existing, record))
    if not differing or is_mismatch_allowed:
        return existing
    raise RunConflictError(_conflict_message(run, existing, differing))


def read_run_record(run: RunDirectory) -> RunRecord:
    """The content of ``run.json``.

    Raises FileNotFoundError, StorageError, or DataFormatError that names the wrong field.
    """
    return _checked_record(read_json(run.run_json), run.run_json, RunRecord)


def run_identity(record: RunRecord) -> str:
    """What tells a run from all others, also after its folder was renamed or copied."""
    return f"{record.experiment}/{record.run_id} of {record.created_at}"


def next_segment_number(run: RunDirectory) -> int:
    """One more than the highest number of a segment record; 1 for a new run."""
    return max(_numbers_among(_segment_names(run)), default=0) + 1


def write_segment(
    run: RunDirectory,
    record: SegmentRecord,
    write: Callable[[Path, Any], None] = write_json_durably,
) -> None:
    """Write or rewrite the record of one's own segment. Durable after return.

    Args:
        run: the run.
        record: what to write.
        write: how a file is replaced; as the run's writer, ``fenced.publish_json``.

    Raises StorageError; then the previous version of the record is still there.
    """
    _make_folder(run, "segments")
    write(run.segment(record.number), record.model_dump(mode="json"))


def read_segments(run: RunDirectory) -> list[SegmentRecord]:
    """The records of all segments, by number. Empty for a new run.

    One that is damaged is left out with a warning: it says how a segment went, and nothing that a
    run needs. Raises StorageError.
    """
    return segments_among(_segment_names(run), run, read_json)


def has_ended(run: RunDirectory) -> bool:
    """Whether the newest segment of a run was its last."""
    segments = read_segments(run)
    return bool(segments) and segments[-1].outcome == "completed"


def segments_among(
    names: Iterable[str], run: RunDirectory, read: Callable[[Path], Json]
) -> list[SegmentRecord]:
    """As ``read_segments``, of files with these names, whose content ``read`` gives."""
    records = []
    for number in _numbers_among(names):
        path = run.segment(number)
        try:
            record = _checked_record(read(path), path, SegmentRecord)
            _require_number(run, record, number)
            records.append(record)
        except FileNotFoundError:
            continue  # taken away since it was listed
        except DataFormatError as error:
            logger.warning("left out of the run's history: %s", error)
    return records


def ledger_outcome(record: SegmentRecord, *, is_alive: bool) -> LedgerOutcome:
    """What became of a segment. A lost machine is a preemption, as a notice of it would be.

    Args:
        record: its record.
        is_alive: whether it may still be running: it is the newest one, and the run's lease is
            held. Every earlier one has ended, since a run has one writer.
    """
    if record.outcome == "running":
        return "running" if is_alive else "killed"
    error = record.error
    is_machine_lost = error is not None and error.type == MachineLostError.__name__
    return "preempted" if is_machine_lost else record.outcome


def segment_duration_s(record: SegmentRecord) -> float:
    """How long a segment lived. One that was killed counts as far as its record tells."""
    if record.ended_at is None:
        return sum(record.costs_s.values())
    ended = datetime.fromisoformat(record.ended_at)
    return max(0.0, (ended - datetime.fromisoformat(record.started_at)).total_seconds())


def _make_folder(run: RunDirectory, name: str = "") -> None:
    folder = run.path / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the folder {folder}: {error.strerror}") from error


def _segment_names(run: RunDirectory) -> list[str]:
    try:
        return [path.name for path in run.segments.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot list {run.segments}: {error.strerror}") from error


def _numbers_among(names: Iterable[str]) -> list[int]:
    found = map(SEGMENT_NAME.fullmatch, names)
    numbers = (int(name[1]) for name in found if name is not None)
    return sorted(number for number in numbers if number > 0)


def _require_number(run: RunDirectory, record: SegmentRecord, number: int) -> None:
    if record.number != number:
        raise DataFormatError(
            f"{run.segment(number)} is the record of segment {record.number}, not of {number}; "
            "move it away"
        )


def _checked_record(value: Json, path: Path, kind: type[RecordT]) -> RecordT:
    version = value.get("format_version") if isinstance(value, dict) else None
    if version != FORMAT_VERSION:
        raise DataFormatError(
            f"{path} has format version {version!r}, this Holdfast reads {FORMAT_VERSION}: "
            f"use the Holdfast that wrote it, or a newer one"
        )
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataFormatError(
            f"{path}: {place}: {first['msg']}, found {first['input']!r:.80}; the file was changed "
            f"by something else than Holdfast"
        ) from error


def conflicts(existing: RunRecord, record: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    """What makes two records describe different runs. An unknown fingerprint differs from none.

    What changes only the choice among the weights that training left does not.
    """
    prints = (existing.data_fingerprint, record.data_fingerprint)
    if None not in prints and prints[0] != prints[1]:
        yield "data_fingerprint", *prints
    yield from _differences(existing.weight_files, record.weight_files, "weight_files")
    if existing.config_digest != record.config_digest:
        # Where every key agrees, another version made the digest: it is the same run.
        keys = _differences(_result_keys(existing.config), _result_keys(record.config))
        allowed = _allowed_keys(record.config)
        for difference in keys:
            if not is_choice_only(difference[0]) and difference[0] not in allowed:
                yield difference


def _allowed_keys(config: dict[str, Any]) -> tuple[str, ...]:
    """The keys that may have another value because the configuration says so."""
    is_allowed = config.get("distributed", {}).get("should_allow_other_num_processes", False)
    return WIDTHS if is_allowed else ()


def _result_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that the digest covers; all of them if another version wrote the configuration."""
    try:
        return digested_values(config_from_record(config))
    except ConfigError:
        return config


def _differences(there: Any, here: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value there, value here) of each leaf that differs, keys dotted and sorted."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for name in sorted(there.keys() | here.keys()):
            inner = f"{key}.{name}" if key else name
            yield from _differences(there.get(name, ABSENT), here.get(name, ABSENT), inner)
    elif there != here:
        yield key, there, here


def _conflict_message(
    run: RunDirectory, existing: RunRecord, differing: Sequence[tuple[str, Any, Any]]
) -> str:
    shown = [
        f"{key}: {there!r} there, {here!r} here"
        for key, there, here in differing[:MAX_DIFFERENCES_SHOWN]
    ]
    if len(differing) > MAX_DIFFERENCES_SHOWN:
        shown.append(f"and {len(differing) - MAX_DIFFERENCES_SHOWN} more")
    is_script = existing.script is not None
    way_out = "; holdfast exec --allow-mismatch goes on with the other one" if is_script else ""
    return (
        f"{run.path} belongs to another run ({'; '.join(shown)}): "
        f"take another run id, or the configuration that this one was begun with{way_out}"
    )
