"""What a finished run shows in Prefect: tables, a picture and links."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE

from tasks.job import Job
from tasks.learning_curves import data_uri, draw_learning_curves
from tasks.run_summary import champion_name, history_of, numbers_in, read_optional
from training.run_directory import RunDirectory, read_segments


@task(name="show", persist_result=False, cache_policy=NO_CACHE)
def show_run(job: Job) -> None:
    """Table of candidates, learning curves, parity table, links to bundle and report."""
    run = job.run
    segments = read_segments(run)
    preempted_steps = [s.end_step for s in segments if s.outcome == "preempted"]
    picture = data_uri(draw_learning_curves(history_of(run), preempted_steps))
    create_markdown_artifact(
        key="learning-curves",
        markdown=f"![learning curves]({picture})\n\nRed: a segment was preempted there.",
        description=f"Loss of {job.experiment}/{job.run_id}",
    )
    _show_table("candidates", candidate_rows(run), "Validation metrics of each candidate")
    _show_table("parity", parity_rows(run), "Exported artifacts against the champion")
    _show_link("bundle", run.bundle)
    _show_link("report", run.report_html)


def candidate_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """One row per candidate of ``evaluation.json``: its name, its metrics, who won."""
    evaluation = read_optional(run.evaluation_json) or {}
    champion = champion_name(evaluation)
    rows = []
    for candidate in _named_entries(evaluation.get("candidates")):
        metrics = numbers_in(candidate.get("validation") or candidate.get("metrics"))
        row: dict[str, Any] = {"candidate": candidate["name"]}
        row.update({name: f"{value:.6g}" for name, value in metrics.items()})
        row["champion"] = "★" if candidate["name"] == champion else ""
        rows.append(row)
    return rows


def parity_rows(run: RunDirectory) -> list[dict[str, Any]]:
    """One row per artifact of ``parity.json``, with each value that is a number or a word."""
    parity = read_optional(run.bundle / "parity.json") or {}
    return [
        {key: value for key, value in entry.items() if isinstance(value, (str, int, float))}
        for entry in _named_entries(parity.get("artifacts"))
    ]


def _named_entries(entries: Any) -> list[dict[str, Any]]:
    """A list of mappings with names, or a mapping of names to mappings, as the former."""
    if isinstance(entries, dict):
        return [{"name": name, **entry} for name, entry in entries.items()]
    return [entry for entry in entries or [] if isinstance(entry, dict) and "name" in entry]


def _show_table(key: str, rows: list[dict[str, Any]], description: str) -> None:
    if rows:
        create_table_artifact(key=key, table=rows, description=description)


def _show_link(key: str, path: Path) -> None:
    if path.exists():
        create_link_artifact(link=path.absolute().as_uri(), link_text=str(path), key=key)
