"""The stages of a script's run: the script is run in the stage's process, up to where it serves.

A segment runs all of it. The stages after training run it up to ``run.champion``: its loop has no
steps left, what it keeps is what training ended with, and what it hands over stands in the place of
an experiment.
"""

from __future__ import annotations

import io
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from holdfast.training.configuration.loading import config_from_record
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import HoldfastError, InputError
from holdfast.training.exactness.seeding import derive_seed
from holdfast.training.experiment.loading import experiment_name, script_path
from holdfast.training.own_loop.champion import HandedOver
from holdfast.training.own_loop.ending import ScriptEndedError
from holdfast.training.own_loop.environment import (
    ALLOW_MISMATCH,
    ARGUMENTS,
    EXPERIMENT,
    IS_STRICT,
    RUN_ID,
    SETTINGS,
    STORE,
)
from holdfast.training.own_loop.host import ChampionReachedError, Host, become_host
from holdfast.training.own_loop.run import Run
from holdfast.training.preemption.notices import PreemptionMonitor
from holdfast.training.replicas.starting import EndedInProcessesError
from holdfast.training.runs.directory import RunRecord, read_run_record
from holdfast.training.runs.progress import Progress, as_text
from holdfast.training.runs.segment_log import SegmentLog
from holdfast.training.stage import (
    EXIT_PREEMPTED,
    SEED_PURPOSES,
    Stage,
    StageArguments,
    StageOutcome,
    tell_error,
)

STDOUT, STDERR = 1, 2
NO_CHAMPION = (
    "the script hands over no champion: it ends without a call of run.champion(model=…, "
    "evaluate=…, example_inputs=…) after its loop"
)


def run_script_stage(
    arguments: StageArguments, run_stage: Callable[[Stage], StageOutcome], log: SegmentLog
) -> StageOutcome:
    """A stage after training, with what the script hands over. Raises what those raise.

    InputError where there is no such run, or the script hands nothing over.
    """
    record = _recorded(arguments)
    with _own_stream(arguments, log) as stream:
        host = _host(arguments, record, _progress(arguments, log, stream), log)
        _run_script(arguments)
        run = _run_of(host)
        try:
            if host.champion is None:
                raise InputError(NO_CHAMPION)
            return run_stage(_stage(arguments, run, host.champion, record, log))
        finally:
            run.opened.monitor.stop()


def run_script_segment(arguments: StageArguments, log: SegmentLog) -> StageOutcome:
    """Train, from the newest checkpoint to the script's end or to a notice.

    Raises what the script raises, once it is recorded.
    """
    record = _recorded(arguments) if arguments.is_resume else None
    with _own_stream(arguments, log) as stream:
        host = _host(arguments, record, _progress(arguments, log, stream), log)
        host.is_training = True
        error: BaseException | None = None
        try:
            code = _run_script(arguments)
            error = _failed(code)
        except EndedInProcessesError as ended:
            tell_error(ended.outcome)
            return ended.outcome
        except BaseException as raised:  # noqa: BLE001  # below, once it is recorded
            error = raised if host.run is None else host.run.cause(raised)
        if host.run is not None:
            error = host.run.end(error) or error
            host.run.opened.monitor.stop()
        if error is not None:
            raise error
    return _segment_outcome(host, code)


def _segment_outcome(host: Host, code: int) -> StageOutcome:
    run = _run_of(host)
    notice = run.opened.monitor.notice
    told: dict[str, Any] | None = None
    if code == EXIT_PREEMPTED and notice is not None:
        told = {"source": notice.source, "reason": notice.reason}
    return StageOutcome(
        "preempted" if code else "completed",
        code,
        step=run.step,
        notice=told,
        has_champion=host.champion is not None,
    )


def reported_stage(arguments: StageArguments, log: SegmentLog) -> Stage:
    """The stage ``report``, which needs nothing of the script. Raises InputError without a run."""
    record = _recorded(arguments)
    config = config_from_record(record.config)
    progress = Progress(arguments.progress_format, config.logging.every_s)
    no_experiment: Any = object()
    run, monitor = arguments.run, PreemptionMonitor(())
    return Stage(arguments, config, no_experiment, run, record, monitor, progress, log)


def script_experiment(reference: str) -> HandedOver:
    """What a script hands over, in a process that was started by a stage of it."""
    arguments = json.loads(os.environ[ARGUMENTS])
    host = Host(progress=Progress("none"), log=SegmentLog())
    become_host(host)
    _execute(script_path(reference), arguments)
    run = _run_of(host)
    run.opened.monitor.stop()
    if host.champion is None:
        raise InputError(NO_CHAMPION)
    return host.champion


def _failed(code: int) -> HoldfastError | None:
    """What the exit code says that the script left with; None where it says nothing is wrong."""
    if code in (0, EXIT_PREEMPTED):
        return None
    kind = InputError if code == InputError.exit_code else ScriptEndedError
    return kind(f"the script ended with exit code {code}")


def _host(
    arguments: StageArguments, record: RunRecord | None, progress: Progress, log: SegmentLog
) -> Host:
    """Make this process a host, and say to the script, and to processes below, what is asked."""
    script = record.script if record is not None else None
    asked = arguments.script_arguments or tuple(script.arguments if script else ())
    overrides = (*(script.overrides if script else ()), *arguments.overrides)
    os.environ |= {
        STORE: str(arguments.store),
        EXPERIMENT: experiment_name(arguments.experiment),
        RUN_ID: arguments.run_id,
        IS_STRICT: "1" if arguments.is_strict else "",
        ALLOW_MISMATCH: "1" if arguments.should_allow_mismatch else "",
        SETTINGS: json.dumps(list(dict.fromkeys(overrides))),
        ARGUMENTS: json.dumps(list(asked)),
    }
    host = Host(progress, log)
    become_host(host)
    return host


def _progress(arguments: StageArguments, log: SegmentLog, stream: TextIO | None) -> Progress:
    progress = Progress(arguments.progress_format, stream=stream)
    if progress.format != "text":
        progress.listeners.append(lambda *event: log.write(as_text(*event)))
    return progress


@contextmanager
def _own_stream(arguments: StageArguments, log: SegmentLog) -> Iterator[TextIO | None]:
    """Where events go. What a script prints is not ours to parse: it goes to standard error.

    There the segment's log keeps it, as nobody may be looking.
    """
    if arguments.progress_format != "jsonl":
        yield None
        return
    sys.stdout.flush()
    stream = os.fdopen(os.dup(STDOUT), "w", encoding="utf-8")
    os.dup2(STDERR, STDOUT)
    log.takes_stdout = True
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        yield stream
    finally:
        sys.stdout.flush()
        stream.flush()
        log.takes_stdout = False
        os.dup2(stream.fileno(), STDOUT)


def _run_script(arguments: StageArguments) -> int:
    """The exit code that the script leaves with."""
    path = script_path(arguments.experiment)
    if not path.is_file():
        raise InputError(f"there is no script {path}; check the path")
    return _execute(path, json.loads(os.environ[ARGUMENTS]))


def _execute(path: Path, arguments: Sequence[str]) -> int:
    """Run a script as Python does it. Its module stays: functions that it handed over live on."""
    path = path.absolute()
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    try:
        with _never_left_by_a_fork():
            code = compile(path.read_bytes(), str(path), "exec")
            exec(code, module.__dict__)
    except ChampionReachedError:
        return 0
    except SystemExit as leaving:
        return _exit_code(leaving)
    return 0


@contextmanager
def _never_left_by_a_fork() -> Iterator[None]:
    """A process that the script forks ends where the script does: the stage is not its own."""
    pid, code = os.getpid(), 0
    try:
        yield
    except BaseException as error:
        if os.getpid() == pid:
            raise
        code = _exit_code(error) if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
    if os.getpid() != pid:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _run_of(host: Host) -> Run:
    run: Run | None = host.run
    if run is None:
        raise InputError(
            "the script does not call holdfast.run: see docs/own_loop.md, or name an experiment "
            "as path/to/file.py:Class"
        )
    return run


def _recorded(arguments: StageArguments) -> RunRecord:
    try:
        record = read_run_record(arguments.run)
    except FileNotFoundError:
        raise InputError(f"there is no run to resume at {arguments.run.path}") from None
    if record.script is None:
        raise InputError(f"{arguments.run.path} is the run of an experiment, and not of a script")
    return record


def _stage(
    arguments: StageArguments,
    run: Run,
    champion: HandedOver,
    record: RunRecord,
    log: SegmentLog,
) -> Stage:
    opened = run.opened
    seeds = {purpose: derive_seed(opened.seed, purpose) for purpose in SEED_PURPOSES}
    return Stage(
        arguments=arguments,
        config=_as_trained(opened.config, champion),
        experiment=champion,
        run=opened.run,
        record=record.model_copy(update={"seeds": {**seeds, **record.seeds}}),
        monitor=opened.monitor,
        progress=opened.progress,
        log=log,
    )


def _as_trained(config: RunConfig, champion: HandedOver) -> RunConfig:
    """Models are measured where they were trained, as the script's data are there.

    Its batches are its own: which part of them a model takes is not known, so that statistics of
    batch norm are not recomputed.
    """
    selection = config.selection.model_copy(update={"should_recompute_batch_norm": False})
    train = config.train.model_copy(update={"device": champion.device_type})
    return config.model_copy(update={"selection": selection, "train": train})
