"""What a finished run shows in Prefect: tables, a picture and links."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from holdfast.tasks.job import Job
from holdfast.tasks.learning_curves import data_uri, draw_learning_curves
from holdfast.tasks.run_summary import (
    champion_name,
    history_of,
    numbers_in,
    read_optional,
    read_promotion,
    reading_command,
)
from holdfast.training.bundles.summary import published_name
from holdfast.training.runs.directory import RunDirectory, read_segments
from holdfast.training.runs.shown_text import shown
from holdfast.training.tiers.scratch import run_name, told_path, told_store

# Keys of an artifact in parity.json, in the order in which a reader asks for them.
PARITY_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "name": ("artifact", str),
    "is_passed": ("proven", lambda is_passed: "yes" if is_passed else "NO"),
    "max_error": ("largest error", "{:.2g}".format),
    "bound": ("allowed", "{:.2g}".format),
    "agreement": ("same class", "{:.2%}".format),
    "num_probes": ("probes", str),
    "size_bytes": ("bytes", "{:,}".format),
}


@task(name="show", persist_result=False, cache_policy=NO_CACHE)
def show_run(job: Job) -> None:
    """Table of candidates, learning curves, parity table, links to bundle and report."""
    run = job.run
    segments = read_segments(run)
    preempted_steps = [s.end_step for s in segments if s.outcome == "preempted"]
    picture = data_uri(draw_learning_curves(history_of(run), preempted_steps))
    legend = "\n\nDashed: a segment was preempted there." if preempted_steps else ""
    create_markdown_artifact(
        key="learning-curves",
        markdown=f"![learning curves]({picture}){legend}",
        description=shown(f"Loss of {job.experiment}/{job.run_id}"),
    )
    _show_table("candidates", candidate_rows(run), "Validation metrics of each candidate")
    _show_table("parity", parity_rows(run), "Exported artifacts against the champion")
    _show_link("bundle", run, run.bundle)
    _show_link("report", run, run.report_html)


def candidate_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """One row per candidate of ``evaluation.json``: its name, its metrics, who won."""
    evaluation = read_optional(run.evaluation_json) or {}
    champion = champion_name(evaluation)
    rows = []
    for candidate in _named_entries(evaluation.get("candidates")):
        metrics = numbers_in(candidate.get("validation") or candidate.get("metrics"))
        row: dict[str, Any] = {"candidate": candidate["name"]}
        row.update({name: f"{value:.6g}" for name, value in metrics.items()})
        row["from steps"] = ", ".join(map(str, candidate.get("steps", [])))
        row["champion"] = "★" if candidate["name"] == champion else ""
        rows.append(row)
    return rows


def parity_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """One row per artifact of ``parity.json``: how far it is from the champion, and how far it may.

    Values that we have no column for are left to the file.
    """
    parity = read_optional(run.bundle / "parity.json") or {}
    return [
        {
            title: show(entry[key])
            for key, (title, show) in PARITY_COLUMNS.items()
            if entry.get(key) is not None
        }
        for entry in _named_entries(parity.get("artifacts"))
    ]


def _named_entries(entries: Any) -> list[dict[str, Any]]:
    """A list of mappings with names, or a mapping of names to mappings, as the former."""
    if isinstance(entries, dict):
        return [{"name": name, **entry} for name, entry in entries.items()]
    return [entry for entry in entries or [] if isinstance(entry, dict) and "name" in entry]


def _show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    if rows:
        told = [{shown(title): shown(cell) for title, cell in row.items()} for row in rows]
        create_table_artifact(key=key, table=told, description=description)


def fetching_command(key: str, run: RunDirectory) -> str:
    """What brings the bundle or the report of a run in a bucket onto a machine.

    A signed address would do so, too, and be a credential for whoever reads it.
    """
    if key == "report":
        return reading_command(run)
    store, name = told_store(run.path.parent.parent), run_name(run)
    promotion = read_promotion(run)
    if promotion is None:
        return f"holdfast copy {name} runs --store {store}"
    return f"holdfast pull {published_name(promotion)} --to model --store {store}"


def _show_link(key: str, run: RunDirectory, path: Path) -> None:
    if path.exists() and (place := told_path(path)) != str(path):
        create_markdown_artifact(
            key=key,
            markdown=f"`{place}`\n\nTo have it on a machine: `{fetching_command(key, run)}`",
            description=f"The {key}, in the store",
        )
    elif path.exists():
        create_link_artifact(
            link=path.absolute().as_uri(),
            link_text=str(path),
            key=key,
            description=f"The {key}, in the store that all workers share",
        )
