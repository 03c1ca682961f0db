"""What a rehearsal finds, as values. No torch: the command line shows them, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from holdfast.training.errors import HoldfastError, InputError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a rehearsal found.

    Attributes:
        severity: ``error``, not fit to train; ``warning``, not exact, an error where --strict asks
            for it; ``note``, good to know.
        act: what was being tried.
        message: what was found, and what to do.
        traceback: of an error in the user's code; empty otherwise.
        may_pass: an error that may be gone the next time, such as a disk that did not answer.
    """

    severity: Severity
    act: str
    message: str
    traceback: str = ""
    may_pass: bool = False


@dataclass(frozen=True)
class Report:
    """All that a rehearsal found.

    Attributes:
        acts: what was tried to its end, and the seconds that it took.
        left_out: what was not tried.
        cost: figures about checkpoints, by name; empty where it did not come to that.
    """

    findings: tuple[Finding, ...] = ()
    acts: Mapping[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)
    duration_s: float = 0.0

    def errors(self, *, is_strict: bool) -> tuple[Finding, ...]:
        """Why the experiment is not fit; empty where it is."""
        wrong = ("error", "warning") if is_strict else ("error",)
        return tuple(finding for finding in self.findings if finding.severity in wrong)

    def as_json(self, *, is_strict: bool) -> dict[str, Any]:
        """For programs."""
        return {"is_fit": not self.errors(is_strict=is_strict), **asdict(self)}


class RehearsalError(InputError):
    """The experiment is not fit to be trained; nothing was written."""


class RehearsalFailedError(HoldfastError):
    """The rehearsal failed for a reason that may be gone the next time."""


def error_of(report: Report, *, is_strict: bool) -> HoldfastError | None:
    """The error that refuses the experiment; None where it is fit."""
    errors = report.errors(is_strict=is_strict)
    if not errors:
        return None
    final = [finding for finding in errors if not finding.may_pass]
    first = (final or list(errors))[0]
    more = f" (and {len(errors) - 1} more, see above)" if len(errors) > 1 else ""
    kind = RehearsalError if final else RehearsalFailedError
    return kind(f"{first.message}{more}")


def lines(report: Report) -> Iterator[str]:
    """What a person reads: findings, the gravest first, then what was left out and the cost."""
    for severity in ("error", "warning", "note"):
        for finding in report.findings:
            if finding.severity == severity:
                yield f"{severity}: {finding.act}: {finding.message}"
    if report.left_out:
        yield f"left out: {', '.join(report.left_out)}"
    if report.cost:
        yield f"cost: {cost_line(report.cost)}"


def cost_line(cost: Mapping[str, Any]) -> str:
    """Checkpoints in one line."""
    return (
        f"a checkpoint of {_size(cost['checkpoint_bytes'])}; at most {cost['num_full']} in full "
        f"and {cost['num_weights']} as weights are kept, together {_size(cost['kept_bytes'])} of "
        f"{_size(cost['free_bytes'])} that are free; a save takes about {cost['save_s']:.1f} s, "
        f"the grace period is {cost['grace_period_s']:g} s"
    )


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
