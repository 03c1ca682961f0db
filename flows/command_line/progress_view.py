"""What a person sees while a run goes on: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from holdfast.training.bundles.summary import promotion_line, published_name
from holdfast.training.runs.shown_text import shown

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Event = Mapping[str, Any]

PROGRESS = ("progress", "rehearsing")
"""Events that say how far a stage is; those of training have the step."""
STAGE_TITLES = {
    "rehearsal": "rehearsal",
    "segment": "training",
    "candidates": "candidates",
    "evaluate": "evaluation",
    "export": "export and parity",
    "promote": "promotion",
    "report": "report",
}


class ProgressView(Protocol):
    """Shows the events of a run, one after another."""

    def show(self, event: Event) -> None:
        """Take one event in; unknown ones are ignored."""
        ...

    def say(self, text: str) -> None:
        """One line to the user, beside the bars."""
        ...

    def close(self) -> None:
        """Take the bars away."""
        ...


class LineView:
    """For scripts and logs: lines on stderr for what happens, and at times for how far it is."""

    def __init__(self, progress_every_s: float = 60.0) -> None:
        self._progress_every_s = progress_every_s
        self._told_s = time.monotonic()

    def show(self, event: Event) -> None:
        """Each stage, what matters in it, and its progress every ``progress_every_s`` seconds."""
        kind, title = event.get("event"), title_of(event)
        if (line := line_of(event)) is not None:
            self.say(line)
        elif kind == "stage" and event.get("state") == "started":
            self.say(title)
        elif kind in PROGRESS and time.monotonic() - self._told_s >= self._progress_every_s:
            self._told_s = time.monotonic()
            self.say(f"{title}: {progress_of(event)[2]}")

    def say(self, text: str) -> None:
        """One line on stderr."""
        print(shown(text), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing."""


class TerminalView:
    """One bar a stage."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True)
        self._progress: Progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<17}"),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._bars: dict[str, TaskID] = {}
        self._progress.start()

    def show(self, event: Event) -> None:
        """Move the bar of the event's stage."""
        kind = event.get("event")
        stage = str(event.get("stage", "segment"))
        if kind == "stage":
            self._bar(stage)
            if event.get("state") == "finished":
                self._finish(stage)
        elif kind in PROGRESS:
            done, total, detail = progress_of(event)
            bar, detail = self._bar(stage), shown(detail)
            self._progress.update(bar, completed=done, total=total, detail=detail)
        elif kind == "outcome" and event.get("step") is not None:
            self._progress.update(self._bar(stage), detail=f"step {event['step']}")
        elif (line := line_of(event)) is not None:
            self.say(line)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._console.print(shown(text), highlight=False, markup=False)

    def close(self) -> None:
        """Stop drawing; the bars stay as they are."""
        self._progress.stop()

    def _bar(self, stage: str) -> TaskID:
        if stage not in self._bars:
            title = title_of({"stage": stage})
            self._bars[stage] = self._progress.add_task(title, total=None, detail="")
        return self._bars[stage]

    def _finish(self, stage: str) -> None:
        total = next(t.total for t in self._progress.tasks if t.id == self._bars[stage]) or 1
        self._progress.update(self._bars[stage], total=total, completed=total)


def title_of(event: Event) -> str:
    """The stage of an event, in words."""
    stage = str(event.get("stage", "segment"))
    return STAGE_TITLES.get(stage, stage)


def line_of(event: Event) -> str | None:
    """What a person should know of an event; None for what only moves a bar."""
    kind = event.get("event")
    if kind == "notice":
        return f"notice from {event.get('source')}: {event.get('reason')}; saving"
    if kind == "restored":
        return f"goes on from step {event.get('step')}"
    if kind == "promotion":
        return f"{published_name(event)} {promotion_line(event)}"
    if kind == "exported" and event.get("saved") is not None:
        size_kb = float(event["weights_bytes"]) / 1e3
        return f"weights {size_kb:,.1f} kB, {event['saved']:.0%} less than the full checkpoint"
    if kind == "log" and event.get("level") in ("warning", "error"):
        return str(event.get("message"))
    return None


def progress_of(event: Event) -> tuple[float, float | None, str]:
    """Done, total and a few words, from a progress event of any stage.

    Training counts steps; the later stages count what they say in ``message``.
    """
    if "step" in event:
        rate = event.get("steps_per_s")
        words = [f"step {event['step']}/{event.get('num_steps', '?')}"]
        words += [f"loss {float(event['loss']):.4g}"] if event.get("loss") is not None else []
        words += [f"{rate:.1f}/s"] if rate else []
        return float(event["step"]), event.get("num_steps"), "  ".join(words)
    return float(event.get("done", 0)), event.get("total"), str(event.get("message", ""))


def open_view(*, is_json: bool) -> ProgressView:
    """Bars where a person watches; lines for scripts and logs."""
    return TerminalView() if sys.stderr.isatty() and not is_json else LineView()
