"""The gate: checks run in a fresh process, which may crash without taking the verdict with it.

The parent writes a request and starts ``python -m holdfast.training.parity.checking_process``. The
child writes one report for each artifact as soon as it is done, so that after a crash the parent
knows which artifact was in the runtime, and goes on with the others in a new child.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from holdfast.training.averages.ensemble import experiment_of
from holdfast.training.configuration.loading import config_from_record
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.errors import CheckDiedError, ExportError
from holdfast.training.exactness.reproducibility import child_environment, python_command
from holdfast.training.experiment.building import build_experiment
from holdfast.training.experiment.loading import is_script, load_experiment
from holdfast.training.experiment.protocol import Experiment
from holdfast.training.loop.experiment_state import restore_experiment
from holdfast.training.parity.merging import merged_experiment
from holdfast.training.parity.parity import ArtifactReport, Finding

POLL_S = 0.1
MAX_LOG_CHARS = 600
HOSTING = "holdfast.training.own_loop.hosting"  # by name: it knows this room
KILLED = "killed by"
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception|Warning)\b.*: ")
Action = Literal["parity", "latency"]
# What lies between layers goes back to the system when it is freed: else glibc keeps what the
# largest batch took, and each artifact's is added to that of those before. It costs time, so what
# is timed does without.
SURROUNDINGS: dict[Action, dict[str, str]] = {
    "parity": {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
    "latency": {},
}


@dataclass(frozen=True)
class CheckRequest:
    """What a fresh process needs to judge artifacts.

    Attributes:
        experiment: its reference, as on the command line.
        config: the resolved configuration, as JSON.
        champion: the safetensors file that is the truth.
        bundle, scratch: where the artifacts are; the child writes its reports and the golden
            samples below ``scratch``.
        parts: for parity, checks of the parts of a model that is served as several graphs, see
            ``assembly.py``; for latency, the artifacts of its parts, ``<part>.<format>``.
        folder: where the run's own program was started; the child is started there, too.
        state: the checkpoint whose experiment's own state is restored; None for none.
        seeds: those of the run, by purpose.
        candidate: name of the champion, by which an ensemble is known.
    """

    experiment: str
    config: dict[str, Any]
    champion: str
    bundle: str
    scratch: str
    formats: tuple[str, ...]
    num_threads: int = 1
    parts: tuple[str, ...] = ()
    folder: str = "."
    state: str | None = None
    seeds: dict[str, int] = field(default_factory=dict)
    candidate: str = ""

    def build_config(self) -> RunConfig:
        """The configuration as a value."""
        return config_from_record(self.config)

    def build_experiment(self) -> Experiment:
        """The experiment, built and restored as the run's own stages do it, merged if it merges."""
        if is_script(self.experiment):
            script_experiment: Any = getattr(import_module(HOSTING), "script_experiment")  # noqa: B009
            experiment: Experiment = script_experiment(self.experiment)
        else:
            experiment = build_experiment(
                load_experiment(self.experiment), self.build_config(), self.seeds
            )
        restore_experiment(experiment, Path(self.state) if self.state else None)
        return merged_experiment(experiment_of(experiment, self.candidate))

    def report_path(self, action: Action, name: str) -> Path:
        """Where the child writes what it found about an artifact."""
        return Path(self.scratch) / f"{action}-{name}.json"


@dataclass(frozen=True)
class CheckOutcome:
    """Reports by artifact; ``is_stopped``: a notice came before all were done."""

    reports: dict[str, Any] = field(default_factory=dict)
    is_stopped: bool = False


def read_request(path: Path) -> CheckRequest:
    """The request that a parent wrote."""
    values = json.loads(path.read_text())
    lists = {name: tuple(values[name]) for name in ("formats", "parts")}
    return CheckRequest(**{**values, **lists})


def check_in_fresh_process(
    request: CheckRequest,
    action: Action,
    should_stop: Callable[[], bool] = lambda: False,
) -> CheckOutcome:
    """Reports for ``champion`` and every format of the request, in a child for as long as it lives.

    A child that dies gives the artifact that it was at a ``runtime`` finding with its exit code
    or signal. Raises ExportError if it fails, or takes too long, before it reached an artifact, and
    CheckDiedError where it was killed.
    """
    names = (*request.formats, *request.parts)
    if action == "parity":
        names = ("champion", *names)
    reports: dict[str, Any] = {}
    for name in names:
        request.report_path(action, name).unlink(missing_ok=True)
    while remaining := [name for name in names if name not in reports]:
        ended = _run_child(request, action, remaining, should_stop)
        if ended == "stopped":
            return CheckOutcome(reports, is_stopped=True)
        for name in remaining:
            path = request.report_path(action, name)
            if path.is_file():
                reports[name] = json.loads(path.read_text())
        missing = [name for name in remaining if name not in reports]
        if missing:
            reports[missing[0]] = _crash_report(request, action, missing[0], ended)
    return CheckOutcome(reports)


def _run_child(
    request: CheckRequest, action: Action, names: list[str], should_stop: Callable[[], bool]
) -> str:
    """How the child ended: ``exit 0``, ``killed by SIGABRT``, ``stopped``, ``out of time``."""
    scratch = Path(request.scratch)
    request_path, log_path = scratch / f"{action}-request.json", scratch / f"{action}.log"
    request_path.write_text(json.dumps(asdict(request)))
    command = python_command("holdfast.training.parity.checking_process")
    deadline_s = time.monotonic() + request.build_config().export.timeout_s
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            [*command, action, str(request_path), *names],
            cwd=request.folder,
            env={**child_environment(request.num_threads), **SURROUNDINGS[action]},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            while child.poll() is None:
                if should_stop():
                    return "stopped"
                if time.monotonic() > deadline_s:
                    return f"out of time after {request.build_config().export.timeout_s:g} s"
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    return _describe_exit(child.returncode)


def _describe_exit(code: int) -> str:
    import signal

    return f"{KILLED} {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _last_words(log: str) -> str:
    """What the child died of: the last line that names an error, else the end of its log."""
    lines = [line for line in log.splitlines() if ERROR_LINE.match(line)]
    text = lines[-1] if lines else log[-MAX_LOG_CHARS:]
    return " ".join(text.split())[:MAX_LOG_CHARS] or "it said nothing"


def _crash_report(request: CheckRequest, action: Action, name: str, ended: str) -> dict[str, Any]:
    log = (Path(request.scratch) / f"{action}.log").read_text(errors="replace")
    last_lines = _last_words(log)
    if name == "champion" or action == "latency":
        kind = CheckDiedError if ended.startswith(KILLED) else ExportError
        raise kind(f"the {action} check of {name} ended with {ended}: {last_lines}")
    crash = Finding("runtime", "process", f"crashed the runtime ({ended}): {last_lines}")
    return ArtifactReport(name, [crash]).as_json()
