"""What all stages of a run share: configuration, run directory, lease, notices, outcome.

A stage is a process: ``python -m holdfast.training segment``, ``candidates``, ``evaluate``,
``export`` and so on. Each resolves the same configuration, becomes the run's only writer, works
until it is done or a notice comes, and ends with a ``StageOutcome``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.training.configuration.loading import (
    config_digest,
    config_from_record,
    resolve_config,
)
from holdfast.training.configuration.schema import Json, RunConfig, Split
from holdfast.training.distributed.stopping import monitor_of
from holdfast.training.distributed.watchdog import Watch, watched
from holdfast.training.distributed.world import World
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.reproducibility import set_up_torch
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.exactness.surroundings import surroundings
from holdfast.training.exactness.versions import library_versions
from holdfast.training.experiment.building import build_experiment
from holdfast.training.experiment.loading import (
    default_values,
    experiment_name,
    is_same_code,
    load_experiment,
    settings_class,
    source_digest,
    source_file,
)
from holdfast.training.experiment.protocol import Experiment, require_map_style
from holdfast.training.preemption.notices import Notice, PreemptionMonitor, reclaim_signals
from holdfast.training.runs.directory import (
    RunDirectory,
    RunRecord,
    read_run_record,
    utc_now,
    validate_run_id,
    write_run_record_once,
)
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.progress import Progress, ProgressFormat, as_text
from holdfast.training.runs.segment_log import SegmentLog
from holdfast.training.storage.address import address_in
from holdfast.training.tiers.late_files import await_files
from holdfast.training.told_errors import error_line
from holdfast.training.weights.identity import weight_files

EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class StageArguments:
    """What the command line says.

    Attributes:
        num_threads: CPU threads of this process; the run record keeps those of the first segment.
        is_resume: take the configuration from ``run.json``; files and overrides go over it.
        should_allow_mismatch: restore checkpoints of another configuration or model, too.
        should_decide_again: of the promotion; what was decided before is replaced.
        is_strict: warnings about exactness are errors.
        script_arguments: of a script with its own loop.
    """

    experiment: str
    store: Path
    run_id: str
    num_threads: int
    config_file: Path | None = None
    overrides: tuple[str, ...] = ()
    is_resume: bool = False
    should_allow_mismatch: bool = False
    should_decide_again: bool = False
    is_strict: bool = False
    progress_format: ProgressFormat = "text"
    script_arguments: tuple[str, ...] = ()
    folder: Path = field(default_factory=Path.cwd)
    """Where the program was started: an experiment may change the folder."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", self.folder / self.store)

    @property
    def run(self) -> RunDirectory:
        """The run's directory in the store."""
        name = experiment_name(self.experiment)
        return RunDirectory(self.store / name / validate_run_id(self.run_id))


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended.

    Attributes:
        outcome: as in a segment record.
        exit_code: of the process.
        step: optimizer steps that are done.
        notice: source and reason, where a notice ended the stage.
        error: type, message and traceback, where the stage failed.
        has_champion: of a script's training, whether it handed a champion over.
        should_start_again: whether this process is to do the same anew, in the place of ending.
    """

    outcome: Literal["completed", "preempted", "failed"]
    exit_code: int
    step: int | None = None
    notice: dict[str, Json] | None = None
    error: dict[str, Json] | None = None
    has_champion: bool | None = None
    should_start_again: bool = False

    def as_json(self) -> dict[str, Any]:
        """For outcome files and progress lines."""
        told = asdict(self)
        del told["should_start_again"]
        if self.has_champion is None:
            del told["has_champion"]
        return told


@dataclass(frozen=True)
class Stage:
    """A prepared stage. Nothing of the run is changed before ``writing`` is entered."""

    arguments: StageArguments
    config: RunConfig
    experiment: Experiment
    run: RunDirectory
    record: RunRecord
    monitor: PreemptionMonitor
    progress: Progress
    log: SegmentLog = field(default_factory=SegmentLog)
    world: World | None = None
    """The other processes of this training, where it has a strategy."""
    watch: Watch = field(default_factory=Watch)
    """Who is told that training does something new, and when it has ended."""

    def seed(self, purpose: str) -> int:
        """The run's seed for one purpose."""
        return self.record.seeds[purpose]

    def should_stop(self) -> bool:
        """Whether a notice has come."""
        return self.monitor.notice is not None

    @contextmanager
    def writing(self) -> Iterator[Lease]:
        """Be the run's only writer. ``run.json`` is written if it is not there.

        Raises:
            RunConflictError: the run id belongs to another configuration.
            LeaseHeldError: another process is writing this run.
            StorageError: the store cannot be written.
        """
        write_run_record_once(self.run, self.record)
        with Lease.acquire(self.run, self.config.preemption.lease_ttl_s) as lease:
            yield lease


SEED_PURPOSES = ("dataset", "experiment", "model", "order", "training")


Rehearse = Callable[[StageArguments, RunConfig, PreemptionMonitor, Progress], None]


class NoticeCameError(HoldfastError):
    """A notice came before anything was done that would have to be saved."""

    exit_code = EXIT_PREEMPTED

    def __init__(self, notice: Notice | None) -> None:
        super().__init__("a notice came first; there is nothing to save")
        self.notice = notice


def await_checkpoint(
    run: RunDirectory, monitor: PreemptionMonitor, checkpoint: str, names: Collection[str]
) -> None:
    """For an older checkpoint, of which a machine that took the run over has not read all yet.

    Raises NoticeCameError, or StorageError where its files do not come.
    """
    if not await_files(run, lambda: monitor.own_notice() is not None, checkpoint, names):
        raise NoticeCameError(monitor.own_notice())


Resolved = tuple[RunConfig, type[Experiment]]


@contextmanager
def prepared_stage(
    arguments: StageArguments,
    rehearse: Rehearse | None = None,
    log: SegmentLog | None = None,
    resolved: Resolved | None = None,
    world: World | None = None,
    hang_timeout_s: float | None = None,
) -> Iterator[Stage]:
    """Resolve the configuration, listen for notices, build the experiment.

    ``rehearse`` is called before anything is built, for a run that is not there yet. ``log`` is
    what a segment opens and the caller closes; without one it is closed here. ``resolved`` is what
    ``resolve_arguments`` returned, where it is known. As one of several processes, of ``world``,
    it tells nothing but for rank 0, and stops when all do. From the rehearsal on, a process that
    does nothing new for ``hang_timeout_s`` is killed, until the stage ends its watch.

    Raises:
        InputError: the configuration, the experiment, the data or the run id are not usable.
        NoticeCameError: a notice came during the rehearsal.
    """
    run = arguments.run
    config, experiment_class = resolved or resolve_arguments(arguments)
    located = with_absolute_paths(config, arguments.folder, _begun_in(run))
    set_up_torch(config.train.mode, arguments.num_threads)
    progress = Progress(arguments.progress_format, config.logging.every_s)
    if world is not None and world.rank > 0:
        progress.format = "none"
    with ExitStack() as held:
        monitor = held.enter_context(monitor_of(located.preemption, world))
        if rehearse is not None and not run.run_json.exists():
            rehearse(arguments, config, monitor, progress)
        watch = held.enter_context(watched(hang_timeout_s))
        seeds = run_seeds(run, config)
        experiment = build_experiment(experiment_class, located, seeds)
        reclaim_signals("after it was built")
        record = _run_record(arguments, config, experiment, seeds)
        begun_with = weight_files(experiment, located.train)
        record = record.model_copy(update={"weight_files": begun_with})
        if run.run_json.exists():
            record, here = write_run_record_once(run, record), record
            _warn_of_other_code(record, here, experiment_class)
        log = log or held.enter_context(closing(SegmentLog()))
        if progress.format != "text":  # else they go to standard error, which the log keeps
            progress.listeners.append(lambda *event: log.write(as_text(*event)))
        yield Stage(
            arguments, config, experiment, run, record, monitor, progress, log, world, watch
        )


def tell_error(outcome: StageOutcome) -> None:
    """What has ended other processes of this one's, in one line on standard error."""
    if outcome.error is not None:
        print(error_line(outcome.error["message"]), file=sys.stderr)


def failed_outcome(error: BaseException) -> StageOutcome:
    """The outcome of a stage that an exception ended."""
    exit_code = error.exit_code if isinstance(error, HoldfastError) else 1
    if isinstance(error, KeyboardInterrupt):
        exit_code = EXIT_INTERRUPTED
    return StageOutcome(
        outcome="failed",
        exit_code=exit_code,
        error={
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        },
    )


def data_fingerprint(experiment: Experiment) -> str:
    """What the training and validation data were made from; test data is not looked at.

    Raises ExperimentError where a data set has no items by index.
    """
    splits: tuple[Split, ...] = ("train", "validation")
    parts = []
    for split in splits:
        dataset = experiment.dataset(split)
        require_map_style(dataset, split)
        parts.append(str(getattr(dataset, "fingerprint", f"num_samples={len(dataset)}")))
    return "/".join(parts)


def with_absolute_paths(config: RunConfig, folder: Path, begun_in: str | None) -> RunConfig:
    """The configuration with its relative paths made absolute.

    They are below ``folder``, where this program was started. Data that is not there may be below
    ``begun_in``, where the run was begun: its record was moved, or is read from elsewhere.
    """
    data, train, preemption = config.data, config.train, config.preemption
    if data.folder is not None:
        data = data.model_copy(update={"folder": _located(data.folder, folder, begun_in)})
    if train.initial_weights is not None:
        weights = _located(train.initial_weights, folder, begun_in)
        train = train.model_copy(update={"initial_weights": weights})
    if preemption.sentinel_file is not None:
        file = folder / preemption.sentinel_file
        preemption = preemption.model_copy(update={"sentinel_file": file})
    return config.model_copy(update={"data": data, "train": train, "preemption": preemption})


def _located(path: Path, folder: Path, begun_in: str | None) -> Path:
    if address_in(path) is not None:
        return path
    located = folder / path
    if begun_in is None or located.exists():
        return located
    begun = Path(begun_in) / path
    return begun if begun.exists() else located


def _begun_in(run: RunDirectory) -> str | None:
    try:
        return read_run_record(run).folder
    except FileNotFoundError:
        return None


def resolve_arguments(arguments: StageArguments) -> Resolved:
    """The configuration that arguments ask for, and the class of the experiment.

    Raises InputError where they are not usable.
    """
    run = arguments.run
    experiment_class = load_experiment(arguments.experiment)
    base = default_values(experiment_class)
    if arguments.is_resume:
        try:
            base = config_from_record(read_run_record(run).config).model_dump(mode="json")
        except FileNotFoundError:
            raise InputError(f"there is no run to resume at {run.path}") from None
    config = resolve_config(
        settings_class=settings_class(experiment_class),
        defaults=base,
        file=arguments.config_file,
        overrides=arguments.overrides,
    )
    return config, experiment_class


def resolve_told(arguments: StageArguments, told: Mapping[str, Any]) -> Resolved:
    """As ``resolve_arguments``, of the configuration that another machine has told."""
    experiment_class = load_experiment(arguments.experiment)
    config = resolve_config(settings_class=settings_class(experiment_class), defaults=told)
    return config, experiment_class


def run_seeds(run: RunDirectory, config: RunConfig) -> dict[str, int]:
    """The seeds of a run by purpose: those that it was begun with."""
    try:
        return read_run_record(run).seeds
    except FileNotFoundError:
        return {purpose: derive_seed(config.seed, purpose) for purpose in SEED_PURPOSES}


def _run_record(
    arguments: StageArguments, config: RunConfig, experiment: Experiment, seeds: dict[str, int]
) -> RunRecord:
    source = source_file(type(experiment))
    return RunRecord(
        run_id=arguments.run_id,
        experiment=arguments.experiment,
        config=config.model_dump(mode="json"),
        config_digest=config_digest(config),
        seeds=seeds,
        data_fingerprint=data_fingerprint(experiment),
        experiment_digest=source_digest(
            type(experiment), (config.optimizer.name, config.scheduler.name)
        ),
        versions=library_versions(),
        num_threads=arguments.num_threads,
        surroundings={} if arguments.run.run_json.exists() else surroundings(source),
        created_at=utc_now(),
        folder=str(arguments.folder),
    )


def _warn_of_other_code(
    there: RunRecord, here: RunRecord, experiment_class: type[Experiment]
) -> None:
    digests = (there.experiment_digest, here.experiment_digest)
    if None in digests or digests[0] == digests[1] or is_same_code(here.experiment, digests[0]):
        return
    warn_of_inexactness(
        f"the run {here.run_id} was begun with other code: that of {experiment_class.__name__} had "
        f"the digest {digests[0]}, and {source_file(experiment_class)}, with what it imports from "
        f"its folder, has {digests[1]}; its result will not be that of a run without "
        "interruptions. Go on if you mean to, as after fixing a bug; else go back to that code, or "
        "take another run id"
    )
