"""Which runs and bundles may leave a store. Pure: what there is goes in, what goes comes out.

A run goes if it is neither among the newest of its experiment nor young, has come to its end, and
nothing that stays names it: no alias, no fork, no weights that another run begins with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoredRun:
    """What a plan knows of a run.

    Attributes:
        name: ``experiment/run_id``.
        changed_s: when it was changed last, Unix time.
        identity: as ``run_identity`` has it; empty where the run cannot be read.
        parent: identity of the run that it was forked from; empty for none.
        texts: all texts of its configuration: a path among them may lead to another run.
        obstacle: why it must stay, whatever its age; empty for none.
        tree: of a run in a bucket, the tree that it was seen with.
    """

    name: str
    changed_s: float
    identity: str = ""
    parent: str = ""
    texts: tuple[str, ...] = ()
    obstacle: str = ""
    tree: str = ""


@dataclass(frozen=True)
class StoredVersion:
    """What a plan knows of a version of a bundle.

    Attributes:
        changed_s: when it was published, Unix time.
        run_id: of the run that it was made of; empty where that cannot be read.
        aliases: that stand for it.
    """

    name: str
    version: int
    changed_s: float
    run_id: str = ""
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Rule:
    """What is old enough to go.

    Attributes:
        keep_last: newest runs of each experiment, and versions of each bundle, that stay.
        older_than_s: what was changed within so many seconds stays.
    """

    keep_last: int
    older_than_s: float


@dataclass(frozen=True)
class Plan:
    """What goes, oldest first, and of all else why it stays, by name."""

    runs: tuple[StoredRun, ...] = ()
    versions: tuple[StoredVersion, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


def plan_pruning(
    runs: Sequence[StoredRun], versions: Sequence[StoredVersion], rule: Rule, now_s: float
) -> Plan:
    """What the rule lets go of a store."""
    kept = {run.name: why for run, why in _kept_runs(runs, rule, now_s)}
    for version in versions:
        for alias in version.aliases:
            kept.setdefault(
                f"{version.name}/{version.run_id}", f"{version.name}@{alias} was made of it"
            )
    _keep_what_is_named(runs, kept)
    texts = [text for run in runs if run.name in kept for text in run.texts]
    kept |= {str(version): why for version, why in _kept_versions(versions, texts, rule, now_s)}
    return Plan(
        runs=tuple(sorted((r for r in runs if r.name not in kept), key=lambda r: r.changed_s)),
        versions=tuple(v for v in versions if str(v) not in kept),
        kept=kept,
    )


def _kept_runs(
    runs: Sequence[StoredRun], rule: Rule, now_s: float
) -> Iterator[tuple[StoredRun, str]]:
    num_newer: dict[str, int] = {}
    for run in sorted(runs, key=lambda run: run.changed_s, reverse=True):
        experiment = run.name.partition("/")[0]
        num_newer[experiment] = num_newer.get(experiment, 0) + 1
        if run.obstacle:
            yield run, run.obstacle
        elif num_newer[experiment] <= rule.keep_last:
            yield run, _newest(rule, experiment)
        elif now_s - run.changed_s <= rule.older_than_s:
            yield run, "not old enough"


def _newest(rule: Rule, name: str) -> str:
    among = f"among the {rule.keep_last}" if rule.keep_last > 1 else "the"
    return f"{among} newest of {name}"


def _keep_what_is_named(runs: Sequence[StoredRun], kept: dict[str, str]) -> None:
    """Add to ``kept`` the runs that those in it, and those added, need."""
    waiting = [run for run in runs if run.name in kept]
    while waiting:
        child = waiting.pop()
        for run in runs:
            if run.name in kept:
                continue
            if run.identity and run.identity == child.parent:
                kept[run.name] = f"{child.name} was forked from it"
            elif names(child.texts, run.name):
                kept[run.name] = f"the configuration of {child.name} names it"
            else:
                continue
            waiting.append(run)


def _kept_versions(
    versions: Sequence[StoredVersion], texts: Sequence[str], rule: Rule, now_s: float
) -> Iterator[tuple[StoredVersion, str]]:
    num_newer: dict[str, int] = {}
    for version in sorted(versions, key=lambda one: one.version, reverse=True):
        num_newer[version.name] = num_newer.get(version.name, 0) + 1
        if version.aliases:
            yield version, f"the alias {version.aliases[0]} stands for it"
        elif num_newer[version.name] <= rule.keep_last:
            yield version, _newest(rule, version.name)
        elif now_s - version.changed_s <= rule.older_than_s:
            yield version, "not old enough"
        elif names(texts, f"registry/{version.name}/versions/{version.version:06d}"):
            yield version, "the configuration of a run names it"


def names(texts: Sequence[str], place: str) -> bool:
    """Whether one of the texts is a path that leads to or through ``place``."""
    return any(f"/{place}/" in f"/{text}/" for text in texts)
