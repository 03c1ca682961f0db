"""What a script's run has before it begins: configuration, seeds, notices, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.training.checkpointing.json_state import encode
from holdfast.training.configuration.loading import (
    config_digest,
    nearest,
    parsed_override,
    validated,
)
from holdfast.training.configuration.schema import RunConfig, TrainConfig
from holdfast.training.distributed.seat import own_seat
from holdfast.training.distributed.stopping import AgreedMonitor, monitor_of
from holdfast.training.errors import InputError, UnsupportedStateError
from holdfast.training.exactness.reproducibility import (
    default_num_threads,
    is_environment_set,
    set_up_torch,
)
from holdfast.training.exactness.seeding import seed_generators
from holdfast.training.exactness.strictness import be_strict, warn_of_inexactness
from holdfast.training.exactness.surroundings import surroundings
from holdfast.training.exactness.trial import Trial, asked_trial
from holdfast.training.exactness.versions import library_versions
from holdfast.training.experiment.loading import code_digest
from holdfast.training.own_loop import arguments
from holdfast.training.own_loop.environment import (
    ALLOW_MISMATCH,
    EXPERIMENT,
    IS_STRICT,
    RUN_ID,
    SETTINGS,
    STORE,
)
from holdfast.training.own_loop.host import Host, current_host
from holdfast.training.preemption.notices import PreemptionMonitor
from holdfast.training.ranks.segment import require_same_run
from holdfast.training.replicas.copies import Copies
from holdfast.training.replicas.starting import (
    EndedInProcessesError,
    join_others,
    require_for_scripts,
    run_in_processes,
)
from holdfast.training.runs.directory import (
    RunDirectory,
    RunRecord,
    Script,
    has_ended,
    read_run_record,
    utc_now,
    validate_run_id,
)
from holdfast.training.runs.paths import checked_store
from holdfast.training.runs.progress import Progress
from holdfast.training.runs.segment_log import SegmentLog
from holdfast.training.stage import StageOutcome, failed_outcome
from holdfast.training.storage.address import is_address, parse_address
from holdfast.training.tiers.companion import Companion
from holdfast.training.tiers.scratch import tier_folder

DEFAULTS: dict[str, Any] = {"ema": {"decays": []}}
VALIDATING = (
    "train.steps_per_epoch",
    "checkpoint.weights_every_steps",
    "checkpoint.weights_every_epochs",
)
OWN = (
    "data",
    "spikes",
    "optimizer",
    "scheduler",
    "warmup",
    "early_stopping",
    "rehearsal",
)
"""Sections that say what a script does by itself."""
OWN_KEYS = frozenset(
    (
        *VALIDATING,
        *(
            f"train.{name}"
            for name in TrainConfig.model_fields
            if name not in ("mode", "num_threads")
        ),
        "checkpoint.frozen",
        "checkpoint.max_metric_change",
        "selection.should_recompute_batch_norm",
        "selection.batch_norm_steps",
        "logging.tensorboard",
    )
)
"""Keys of other sections that say something of a loop which is not the script's."""


@dataclass(frozen=True)
class Opened:
    """A run that a script has named. Nothing is written yet.

    Attributes:
        seed: the root of every random number.
        is_mismatch_allowed: checkpoints of another configuration are gone on from.
        trial: what ``holdfast verify-resume`` asks of this process.
        script: its file.
        log: of the process, where it is not the script's own.
        companion: who keeps the run in a bucket, where that is not the starter's matter.
        copies: what is done together with the other processes that run the script, if any do.
        closing: is closed when the script ends.
    """

    run: RunDirectory
    record: RunRecord
    config: RunConfig
    monitor: PreemptionMonitor
    progress: Progress
    is_mismatch_allowed: bool
    trial: Trial
    script: Path | None = None
    log: SegmentLog | None = None
    companion: Companion | None = None
    copies: Copies | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    @property
    def rank(self) -> int:
        """Of the processes that run the script; 0 is the run's writer."""
        return 0 if self.copies is None else self.copies.world.rank

    @property
    def seed(self) -> int:
        """The root of every random number."""
        return self.config.seed


def _opened_store(store: str, name: str) -> tuple[Path, Companion | None]:
    """The absolute path of the store; of a bucket, this machine's, and who keeps the run there.

    Raises InputError for a file or a wrong address, and what ``Companion.start`` raises.
    """
    if not is_address(store):
        return checked_store(Path(store.removeprefix("file://")).absolute()), None
    folder = tier_folder(parse_address(store), "work")
    return folder, None if own_seat() is not None else Companion.start(store, name)


def open_run(
    experiment: str,
    run_id: str,
    store: str | os.PathLike[str],
    seed: int,
    config: object,
    settings: Mapping[str, Any] | None,
) -> Opened:
    """Make ready what ``holdfast.run`` names: generators are seeded, notices are listened for.

    Raises InputError for what cannot be.
    """
    _require_one_process()
    experiment = arguments.text("holdfast.run(experiment=…)", experiment)
    run_id = arguments.text("holdfast.run(run_id=…)", run_id)
    seed = arguments.whole_number("holdfast.run(seed=…)", seed, 0)
    settings = arguments.mapping("holdfast.run(settings=…)", settings, "dotted keys")
    arguments.path("holdfast.run(store=…)", store)
    if os.environ.get(IS_STRICT) == "1":
        be_strict()
    run_id = validate_run_id(os.environ.get(RUN_ID) or run_id)
    experiment = validate_run_id(os.environ.get(EXPERIMENT) or experiment, "an experiment")
    resolved = run_config(seed, config, settings)
    asked = str(os.environ.get(STORE) or store)
    folder, companion = _opened_store(asked, f"{experiment}/{run_id}")
    run = RunDirectory(folder / experiment / run_id)
    host, script = current_host(), _script()
    num_threads = _num_threads(run, resolved)
    progress = _progress(host, resolved.logging.every_s)
    if _needs_processes(run, resolved, host):
        outcome = run_in_processes(resolved, num_threads, progress)
        raise EndedInProcessesError(_brought_up(outcome, companion))
    set_up_torch(resolved.train.mode, num_threads)
    if not is_environment_set(num_threads):
        warn_of_inexactness(
            "the script was not started by holdfast exec: the order of sets of text may differ "
            f"from one start to the next. Write: holdfast exec {Path(sys.argv[0]).name}"
        )
    closing = ExitStack()
    world = join_others(closing)
    monitor = monitor_of(resolved.preemption, world)
    monitor.start()
    seed_generators(seed)
    record = RunRecord(
        run_id=run_id,
        experiment=experiment,
        config=resolved.model_dump(mode="json"),
        config_digest=config_digest(resolved),
        seeds={"script": seed},
        versions=library_versions(),
        num_threads=num_threads,
        surroundings={} if run.run_json.exists() else surroundings(script),
        created_at=utc_now(),
        folder=str(Path.cwd()),
        experiment_digest=None if script is None else code_digest(script),
        script=Script(path=str(script or ""), arguments=sys.argv[1:], overrides=_asked(SETTINGS)),
    )
    copies = None
    if world is not None:
        assert isinstance(monitor, AgreedMonitor)
        require_same_run(record, world)
        copies = Copies(world, seed, monitor)
    if world is not None and world.rank > 0:
        progress = Progress("none")
    else:
        _warn_of_other_code(run, record)
    return Opened(
        run=run,
        record=record,
        config=resolved,
        monitor=monitor,
        progress=progress,
        is_mismatch_allowed=os.environ.get(ALLOW_MISMATCH) == "1",
        trial=asked_trial(),
        script=script,
        log=None if host is None else host.log,
        companion=companion,
        copies=copies,
        closing=closing,
    )


def _needs_processes(run: RunDirectory, config: RunConfig, host: Host | None) -> bool:
    """Whether the script is to be run by several processes, and this is none of them yet."""
    is_training = host is None or (host.is_training and not has_ended(run))
    return config.distributed.num_processes > 1 and is_training and own_seat() is None


def _brought_up(outcome: StageOutcome, companion: Companion | None) -> StageOutcome:
    """How several processes ended, and what is wrong with the bucket that should have it all."""
    behind = None if companion is None else companion.finish()
    return outcome if behind is None or outcome.error is not None else failed_outcome(behind)


def _warn_of_other_code(run: RunDirectory, here: RunRecord) -> None:
    try:
        there = read_run_record(run)
    except FileNotFoundError:
        return
    digests = (there.experiment_digest, here.experiment_digest)
    if here.script is None or None in digests or digests[0] == digests[1]:
        return
    warn_of_inexactness(
        f"the run {here.run_id} was begun with other code: its script had the digest {digests[0]}, "
        f"and {here.script.path}, with what it imports from its folder, has {digests[1]}; its "
        "result will not be that of a run without interruptions. Go on if you mean to, as after "
        "fixing a bug; else go back to that code, or take another run id"
    )


def _progress(host: Host | None, every_s: float) -> Progress:
    if host is None:
        return Progress("text", every_s)
    host.progress.every_s = every_s
    return host.progress


def run_config(seed: int, config: object, settings: Mapping[str, Any] | None) -> RunConfig:
    """A script's configuration as the ``experiment`` table, and Holdfast's own settings.

    ``settings`` has dotted keys: ``{"ema.decays": [0.999], "checkpoint.every_steps": 500}``.
    Raises InputError.
    """
    table: dict[str, Any] = {name: dict(section) for name, section in DEFAULTS.items()}
    allowed = [key for key in RunConfig.model_fields if key not in (*OWN, "experiment", "seed")]
    for key, value in {**(settings or {}), **_overrides(), **asked_trial().settings()}.items():
        section, _, name = arguments.text("a key of settings", key).partition(".")
        if section in OWN:
            raise InputError(f"settings: {key!r} is the script's own matter; leave it out")
        if key in OWN_KEYS and key not in VALIDATING:
            raise InputError(
                f"settings: {key!r} changes nothing in a script's own loop; leave it out"
            )
        if key in VALIDATING:
            raise InputError(
                f"settings: {key!r} says when to validate, and a script does so by itself: call "
                f"run.validated after as many steps, and leave it out"
            )
        if section not in allowed or not name:
            raise InputError(
                f"settings: {key!r} is no key of Holdfast's; {nearest(section, allowed)}, such as "
                f"'checkpoint.every_steps'"
            )
        if section == "distributed":
            require_for_scripts(name, value)
        table.setdefault(section, {})[name] = value
    table = {**table, "seed": seed, "experiment": _plain(config)}
    return validated(RunConfig, table, prefix="settings: ")


def _overrides() -> dict[str, Any]:
    """What ``--set`` said, in the place of the script's own settings."""
    return dict(map(parsed_override, _asked(SETTINGS)))


def _asked(variable: str) -> list[str]:
    return list(json.loads(os.environ.get(variable) or "[]"))


def _plain(config: object) -> dict[str, Any]:
    """A script's configuration as JSON: a dict, a dataclass, or what argparse parsed."""
    if config is None:
        return {}
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise InputError(
            f"holdfast.run(config=…): expected a dict, a dataclass or argparse's Namespace of "
            f"everything that changes the result, found {arguments.found(config)}"
        )
    plain = {str(k): str(v) if isinstance(v, Path) else v for k, v in config.items()}
    tensors: dict[str, Any] = {}
    try:
        encode(plain, "config", tensors)
    except UnsupportedStateError as error:
        path, _, found = str(error).partition(";")[0].partition(" is ")
        raise InputError(_not_plain(path, found)) from error
    if tensors:
        raise InputError(_not_plain(next(iter(tensors)), "a tensor"))
    return plain


def _not_plain(path: str, found: str) -> str:
    place = arguments.indexed("config", path.partition("/")[2])
    return f"{place} is {found}; expected numbers, text, lists, dicts"


def _num_threads(run: RunDirectory, config: RunConfig) -> int:
    try:
        known = read_run_record(run).num_threads
    except FileNotFoundError:
        known = None
    if known or config.train.num_threads:
        return known or config.train.num_threads or 1
    if own_seat() is not None:  # its launcher has set it
        return default_num_threads()
    return max(1, default_num_threads() // config.distributed.num_processes)


def _script() -> Path | None:
    path = Path(sys.argv[0]).absolute() if sys.argv and sys.argv[0] else None
    return path if path is not None and path.is_file() else None


def require_main_thread(what: str) -> None:
    """Raise InputError, which says what happened, in another thread."""
    if threading.current_thread() is not threading.main_thread():
        raise InputError(
            f"{what} outside of the main thread, which hears signals: train there, and do "
            "the rest in others"
        )


def _require_one_process() -> None:
    require_main_thread("holdfast.run was called")
    # Set while a process of multiprocessing's spawn reads the main module again.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(
            "holdfast.run was called in a process that the script started, which reads the script "
            'again: put what trains behind if __name__ == "__main__":'
        )
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise InputError(
            f"WORLD_SIZE={world_size}: start the script once, without torchrun; it starts its "
            f"processes by itself, as distributed.num_processes says (docs/own_loop.md)"
        )
