"""From a target to a certificate: calm lives, stopped lives, the comparison, and the cause."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from holdfast.training.certificate.lives import Lives, Target, chosen_stops
from holdfast.training.certificate.verdict import Verdict, compare_runs, last_step, not_kept
from holdfast.training.checkpointing.manifest import read_manifest
from holdfast.training.errors import ExperimentError
from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.directory import read_run_record, read_segments, utc_now
from holdfast.training.runs.losses import loss_files

FORMAT_VERSION = 1
SAVE_EVERY_STEPS = 3
MORE_WORKERS = 2
LOOKS = "looks.json"
NUM_TRACED = 3
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Certificate:
    """What was tried, with what, and what was found.

    Attributes:
        target: what was tried, as it was named.
        num_steps: of each run.
        stops: the steps after which it was stopped, with signals.
        is_repeatable: whether two calm runs had the same bytes; None where that was not asked.
        verdict: of the calm run against the stopped one, or against another calm one.
    """

    target: str
    num_steps: int
    stops: tuple[tuple[int, str], ...]
    is_repeatable: bool | None
    verdict: Verdict
    made_with: dict[str, Any]

    @property
    def is_exact(self) -> bool:
        """Whether no byte differed."""
        return self.is_repeatable is not False and self.verdict.is_exact

    def as_json(self) -> dict[str, Any]:
        """The content of ``certificate.json``."""
        return {"format_version": FORMAT_VERSION, "is_exact": self.is_exact, **asdict(self)}

    def lines(self) -> list[str]:
        """For people; the last line is the verdict."""
        stops = ", ".join(f"{signal} after step {step}" for step, signal in self.stops)
        made, verdict = self.made_with, self.verdict
        told = [
            f"tried    {self.target}: {self.num_steps} steps, calm and stopped: {stops or 'never'}",
            f"with     {made['device']}, {made['num_threads']} threads, torch "
            f"{made['versions']['torch']}, Python {made['versions']['python']}",
        ]
        if self.is_exact:
            compared = f"{verdict.num_tensors} tensors, {verdict.num_losses} losses"
            return [*told, f"exact    0 bytes differ ({compared})"]
        if self.is_repeatable is False:
            told.append("calm     two runs that nobody stopped differ from each other")
        if verdict.first_step is not None and verdict.losses is not None:
            calm, other = verdict.losses
            told.append(f"loss     first differs at step {verdict.first_step}: {calm!r}, {other!r}")
        if verdict.first_tensor is not None:
            told.append(f"state    {verdict.num_differences} differ; first {verdict.first_tensor}")
        told += [f"cause    {cause}" for cause in verdict.causes or ("none was found",)]
        return [*told, "NOT exact: a run that is stopped ends with other bytes"]


def certify(
    target: Target, lives: Lives, *, num_steps: int, num_stops: int, seed: int, tell: Tell
) -> Certificate:
    """Try whether a training that is stopped ends with the bytes of a calm one.

    Args:
        num_steps: at most so many are tried.
        num_stops: how often it is stopped.
        seed: of the places.

    Raises:
        BudgetOverError: there was no time for a verdict.
        ExperimentError: it does not train, or keeps nothing.
    """
    plain = Trial(end_at=num_steps, every_steps=SAVE_EVERY_STEPS)
    tell("a calm run")
    lives.live("calm", plain)
    calm = lives.run("calm")
    num_done = last_step(calm)
    if num_done < 2:  # nothing between the first step and the last
        raise ExperimentError(f"{target.name} did {num_done} steps; a resume needs at least two")
    stops = chosen_stops(num_done, num_stops, seed)
    for number, (step, name) in enumerate(stops):
        tell(f"stopped by {name} after step {step}")
        workers = MORE_WORKERS if number % 2 else None
        asked = replace(plain, stop_at=step, stop_signal=name, num_workers=workers)
        lives.live("stopped", _looking(asked, lives) if number else asked)
    tell("to the end")
    lives.live("stopped", _looking(plain, lives))
    verdict = compare_runs(calm, lives.run("stopped"))
    is_repeatable = None
    if not verdict.is_exact:
        is_repeatable, verdict = _with_causes(target, lives, plain, verdict, tell)
    return Certificate(
        target=target.name,
        num_steps=num_done,
        stops=tuple(stops),
        is_repeatable=is_repeatable,
        verdict=verdict,
        made_with=_made_with(lives),
    )


def _looking(trial: Trial, lives: Lives) -> Trial:
    """A life that writes down what it finds after its resume."""
    return replace(trial, look_at=[0], look_file=str(lives.store / LOOKS))


def _with_causes(
    target: Target, lives: Lives, plain: Trial, verdict: Verdict, tell: Tell
) -> tuple[bool, Verdict]:
    """Whether calm runs repeat each other, and the verdict with what is behind it."""
    tell("why: another calm run")
    seen = lives.store / LOOKS
    resumed = sorted(map(int, json.loads(seen.read_text()))) if seen.exists() else [0]
    looks = [lives.store / f"look-{number}.json" for number in range(2)]
    for number, look in enumerate(looks):
        lives.live(f"again-{number}", replace(plain, look_at=resumed, look_file=str(look)))
    pairs = (("calm", "again-0"), ("again-0", "again-1"))
    compared = [compare_runs(lives.run(one), lives.run(other)) for one, other in pairs]
    # Two may be alike by chance. What differs before the first resume is no fault of a resume.
    again = next((one for one in compared if not one.is_exact), verdict)
    is_late = verdict.first_step is None or verdict.first_step > resumed[0]
    if is_late and all(one.is_exact for one in compared):
        before = [step for step in resumed if step < (verdict.first_step or step + 1)]
        causes = _hidden(target, lives, seen, looks[0], before)
        return True, replace(verdict, causes=tuple(causes))
    causes = _unrepeatable(lives, plain, again)
    return False, replace(again, causes=tuple(causes))


def _hidden(
    target: Target, lives: Lives, seen: Path, calm: Path, resumed: Sequence[int]
) -> list[str]:
    """What the last resume lost that lost something, of those before the first difference."""
    if target.experiment is not None or not (seen.exists() and calm.exists()):
        return _rehearsed(target, lives)
    for step in reversed(resumed):
        if found := not_kept(calm, seen, step):
            return [
                f"{what} was not kept: after step {step} a resumed process finds another one; "
                f"hand it to run.keep, or put it into run.values"
                for what in found
            ]
    return []


def _rehearsed(target: Target, lives: Lives) -> list[str]:
    """What a rehearsal of the experiment has to say about exactness."""
    from holdfast.training.rehearsal.asking import Asked, rehearse

    if target.experiment is None:
        return []
    wanted = target.config_file, target.overrides
    report = rehearse(Asked(target.experiment, lives.store, lives.num_threads, *wanted, "step"))
    return [] if report is None else [finding.message for finding in report.findings]


def _unrepeatable(lives: Lives, plain: Trial, again: Verdict) -> list[str]:
    """Why two calm runs differ: an operator with two results, or something from outside."""
    step = again.first_step or 1
    traces = [lives.store / f"trace-{number}.jsonl" for number in range(NUM_TRACED)]
    looks = [lives.store / f"look-before-{number}.json" for number in range(NUM_TRACED)]
    for number, (trace, look) in enumerate(zip(traces, looks, strict=True)):
        asked = replace(plain, trace_step=step, trace_file=str(trace), end_at=step)
        asked = replace(asked, look_at=[step - 1], look_file=str(look))
        lives.live(f"traced-{number}", asked)
    if not all(path.exists() for path in (*traces, *looks)):
        return []  # an experiment: it has no variables that could be looked at
    others = zip(traces[1:], looks[1:], strict=True)
    found = [_told_apart(step, (traces[0], looks[0]), other) for other in others]
    return next((causes for causes in found if causes), [])


def _told_apart(step: int, one: tuple[Path, Path], other: tuple[Path, Path]) -> list[str]:
    """What two lives did otherwise in a step: traces of operators, and looks before the step."""
    apart = [
        f"{what} differs between two calm runs" for what in not_kept(one[1], other[1], step - 1)
    ]
    lines = (map(json.loads, trace.read_text().splitlines()) for trace, _ in (one, other))
    for (name, inputs, outputs, place), (_, other_inputs, other_outputs, _) in zip(
        *lines, strict=False
    ):
        if inputs != other_inputs:
            return [
                f"step {step} takes in something from outside at {place}: {name} is given other "
                f"values in two runs: the time, a set's order, a file, a thread, unseeded draws",
                *apart,
            ]
        if outputs != other_outputs:
            return [f"{name} gives two results for the same input in step {step}, at {place}"]
    return apart


def _made_with(lives: Lives) -> dict[str, Any]:
    calm = lives.run("calm")
    record, manifest = read_run_record(calm), read_manifest(calm.checkpoint(last_step(calm)))
    segments = read_segments(lives.run("stopped"))
    return {
        "made_at": utc_now(),
        "device": manifest.device,
        "versions": manifest.versions,
        "num_threads": lives.num_threads,
        "surroundings": record.surroundings,
        "code_digest": record.experiment_digest,
        "config_digest": record.config_digest,
        "num_lives": len(segments),
        "num_losses": sum(file.num_steps for file in loss_files(lives.run("stopped"))),
    }
