"""What was made from what, and with what: provenance, configuration, versions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.training.bundles.summary import promotion_line, published_name
from holdfast.training.configuration.schema import RunConfig
from holdfast.training.reporting.choice import ranked_candidates
from holdfast.training.reporting.comparisons import SourceChart
from holdfast.training.reporting.facts import RunFacts
from holdfast.training.reporting.markup import (
    Cell,
    Column,
    Html,
    definitions,
    element,
    joined,
    note,
    section,
    short_digest,
    table,
    text,
)
from holdfast.training.reporting.script import configuration, is_trained_alone
from holdfast.training.reporting.wording import plural
from holdfast.training.runs.directory import TakenOver

ALONE = "run"


def provenance_section(facts: RunFacts) -> Html:
    """Data and configuration, candidates and their checkpoints, exports."""
    record = facts.record
    pairs: list[tuple[str, Cell]] = [("configuration", short_digest(record.config_digest))]
    if record.script is None:
        pairs.insert(0, ("data", short_digest(record.data_fingerprint or "unknown")))
    else:
        pairs.insert(0, ("script", shlex.join([record.script.path, *record.script.arguments])))
        if record.experiment_digest is not None:
            pairs.append(("code", short_digest(record.experiment_digest)))
    pairs += [(name.replace("_", " "), short_digest(one)) for name, one in
              sorted(record.weight_files.items())]  # fmt: skip
    if (lineage := record.lineage) is not None:
        pairs.append(("forked from", f"step {lineage.step} of {lineage.run_id}"))
    champion = facts.candidate(facts.champion)
    if champion is not None:
        pairs.append(("champion", short_digest(champion.digest)))
    parts = [definitions(pairs, "facts")]
    parts += [_taken_over(one) for one in record.taken_over]
    if is_trained_alone(facts):
        return section("What was made from what", joined(parts))
    if facts.candidates:
        parts += [_sources(facts), _files(facts)]
    else:
        parts.append(note("No candidates were made yet."))
    parts.append(_exports(facts))
    return section("What was made from what", joined(parts))


def _taken_over(one: TakenOver) -> Html:
    before = ", ".join(f"{key} = {_shown(value)}" for key, value in one.changed.items())
    return note(
        f"Segment {one.segment} went on from step {one.step} with another configuration; before "
        f"it: {before}."
    )


def configuration_section(facts: RunFacts) -> Html:
    """Every value, section by section; what differs from the general default is marked."""
    found, usual = facts.record.config, RunConfig().model_dump(mode="json")
    single = {name: value for name, value in found.items() if not isinstance(value, Mapping)}
    groups: Mapping[str, Mapping[str, Any]] = {ALONE: single} | {
        name: value for name, value in found.items() if isinstance(value, Mapping) and value
    }
    if facts.record.script is not None:
        groups = configuration(facts)
    drawn = [
        _group(name, values, usual if name == ALONE else usual.get(name, {}))
        for name, values in groups.items()
    ]
    lead = "Bold: other than the general default."
    if facts.record.script is not None:
        lead = f"The script's own, as it gave them to holdfast.run, and Holdfast's settings. {lead}"
    return section("Configuration", element("div", joined(drawn), "columns"), lead)


def versions_section(facts: RunFacts) -> Html:
    """Libraries of the first segment, and where a later one had others."""
    record = facts.record
    pairs: list[tuple[str, Cell]] = [*sorted(record.versions.items())]
    if record.num_threads is not None:
        pairs.append(("threads", record.num_threads))
    content = definitions(pairs, "facts")
    changed = [
        f"segment {one.record.number} had {name} {version}, not {record.versions.get(name)}"
        for one in facts.segments
        for name, version in sorted(one.record.versions.items())
        if version != record.versions.get(name)
    ]
    if changed:
        content = Html(content + element("p", text("; ".join(changed)), "note", varies=True))
    return section("Versions", content)


def _sources(facts: RunFacts) -> Html:
    ranked = ranked_candidates(facts)
    rows = [(one.name, one.steps, one.name == facts.champion) for one in ranked]
    told = "; ".join(f"{name}: {', '.join(map(str, steps))}" for name, steps, _ in rows)
    last = max((step for _, steps, _ in rows for step in steps), default=1)
    title = "checkpoints of each candidate"
    return element("div", SourceChart("sources", title, told, rows, last).drawn(), "charts")


def _files(facts: RunFacts) -> Html:
    ranked = ranked_candidates(facts)
    columns = [
        Column("Candidate", [one.name for one in ranked]),
        Column("Kind", [one.kind for one in ranked]),
        Column("Steps", [", ".join(map(str, one.steps)) for one in ranked]),
        Column("Digest", [short_digest(one.digest) for one in ranked]),
    ]
    if any(one.notes for one in ranked):
        columns.append(Column("Remarks", ["; ".join(one.notes) for one in ranked]))
    return table(columns, marked_rows=[0] if facts.champion else [], name="files of candidates")


def _exports(facts: RunFacts) -> Html:
    head = element("h3", text("Exports"))
    if not facts.exports:
        return Html(head + note(f"No bundle was published yet: {_way_on(facts)}."))
    rows = facts.exports
    columns = [
        Column("Format", [str(row["format"]) for row in rows]),
        Column("File", [str(row.get("name", "")) for row in rows]),
        Column(
            "Parity", ["\u2713 proved" if row["is_passed"] else "\u2717 failed" for row in rows]
        ),
        Column("Largest error", [_scientific(row.get("max_error")) for row in rows]),
        Column("Bound", [_scientific(row.get("bound")) for row in rows]),
        Column("Size (kB)", [_kilobytes(row.get("size_bytes")) for row in rows], decimals=1),
    ]
    words = (
        f"The champion in {plural(len(rows), 'artifact')}; errors against the eager model in fp64, "
        "relative to the largest value of each output."
    )
    tables = Html(table(columns, name="exports") + _latencies(rows))
    return Html(head + note(words) + tables + _promotion(facts.promotion))


def _way_on(facts: RunFacts) -> str:
    return "run the stage export" if facts.record.script is None else "holdfast resume goes on"


def _promotion(promotion: Mapping[str, Any]) -> Html:
    if not promotion:
        return Html("")
    words = f"Published as {published_name(promotion)}; {promotion_line(promotion)}."
    return element("p", text(words), "note", varies=True)  # versions count all runs of a store


def _latencies(rows: Sequence[Mapping[str, Any]]) -> Html:
    """Each artifact and size of the batch beside eager PyTorch, which took turns with it."""
    measured = [
        (str(row["format"]), size.removeprefix("batch-"), times)
        for row in rows
        for size, times in row.get("latency", {}).items()
    ]
    if not measured:
        return Html("")
    columns = [
        Column("Format", [name for name, _, _ in measured]),
        Column("Batch", [size for _, size, _ in measured]),
        Column("p50 (ms)", [times["p50_ms"] for *_, times in measured], decimals=3),
        Column("p99 (ms)", [times["p99_ms"] for *_, times in measured], decimals=3),
        Column("Eager p50 (ms)", [times["eager_p50_ms"] for *_, times in measured], decimals=3),
        Column("Eager p99 (ms)", [times["eager_p99_ms"] for *_, times in measured], decimals=3),
    ]
    words = "One call on one thread; eager PyTorch was called in turn with each artifact."
    return Html(note(words) + table(columns, name="latency of exports"))


def _group(name: str, values: Mapping[str, Any], usual: Mapping[str, Any]) -> Html:
    rows = []
    for key, value in values.items():
        shown = text(_shown(value))
        # An experiment's own settings have no general default to differ from.
        is_changed = key in usual and usual[key] != value
        rows.append((key, element("strong", shown) if is_changed else shown))
    return element("div", Html(element("h3", text(name)) + definitions(rows)), "group")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {_shown(inner)}" for key, inner in value.items()) or "{}"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "not set" if value is None else json.dumps(value)


def _scientific(value: Any) -> Cell:
    return f"{value:.1e}".replace("-", "\u2212") if isinstance(value, float) else None


def _kilobytes(value: Any) -> float | None:
    return value / 1000 if isinstance(value, (int, float)) else None
