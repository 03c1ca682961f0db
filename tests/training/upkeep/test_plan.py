"""What may leave a store, as a function of what is there."""

from __future__ import annotations

from dataclasses import replace

from holdfast.training.upkeep.plan import Rule, StoredRun, StoredVersion, names, plan_pruning

NOW_S = 1000.0
RULE = Rule(keep_last=1, older_than_s=100.0)


def old(name: str, **fields: object) -> StoredRun:
    return replace(StoredRun(name, 10.0, identity=name), **fields)  # type: ignore[arg-type]


def gone(*runs: StoredRun, versions: tuple[StoredVersion, ...] = (), rule: Rule = RULE) -> set[str]:
    plan = plan_pruning(runs, versions, rule, NOW_S)
    assert {run.name for run in plan.runs} | plan.kept.keys() >= {run.name for run in runs}
    return {run.name for run in plan.runs} | {str(one) for one in plan.versions}


NEWEST = StoredRun("e/newest", 20.0, identity="newest")


def test_what_is_old_and_not_among_the_newest_goes() -> None:
    young = old("e/young", changed_s=950.0)
    other = StoredRun("f/only", 1.0)
    assert gone(NEWEST, old("e/a"), old("e/b"), other) == {"e/a", "e/b"}
    assert gone(NEWEST, old("e/a"), young) == {"e/a", "e/newest"}
    assert gone(NEWEST, old("e/a"), rule=Rule(2, 100.0)) == set()
    assert gone(NEWEST, old("e/a"), rule=Rule(1, 990.0)) == set()


def test_what_is_kept_is_told_with_the_reason() -> None:
    for num, told in ((1, "the newest of e"), (2, "among the 2 newest of e")):
        kept = plan_pruning([NEWEST, old("e/a")], (), Rule(num, 100.0), NOW_S).kept
        assert kept[NEWEST.name] == told


def test_what_has_an_obstacle_stays_and_counts_among_the_newest() -> None:
    assert gone(NEWEST, old("e/a", obstacle="is written")) == set()
    assert gone(old("e/newest", changed_s=20.0, obstacle="is written"), old("e/a")) == {"e/a"}


def test_what_a_kept_run_was_forked_from_stays_and_so_do_its_forebears() -> None:
    child = replace(NEWEST, parent="e/a")
    assert gone(child, old("e/a", parent="e/b"), old("e/b"), old("e/c")) == {"e/c"}
    assert gone(NEWEST, old("e/a", parent="e/b"), old("e/b")) == {"e/a", "e/b"}


def test_what_the_configuration_of_a_kept_run_names_stays() -> None:
    weights = "/mnt/runs/e/a/checkpoints/step-00000010/model.safetensors"
    assert gone(replace(NEWEST, texts=(weights,)), old("e/a"), old("e/b")) == {"e/b"}
    assert gone(NEWEST, old("e/a"), old("e/b", texts=(weights,))) == {"e/a", "e/b"}
    assert not names((weights,), "e/ab")
    assert names(("runs/e/a",), "e/a")


def test_versions_that_aliases_stand_for_and_their_runs_stay() -> None:
    versions = tuple(
        StoredVersion("e", number, 10.0, run_id, aliases)
        for number, run_id, aliases in [(1, "a", ()), (2, "b", ("champion",)), (3, "c", ())]
    )
    runs = (NEWEST, old("e/a"), old("e/b"), old("e/c"))
    assert gone(*runs, versions=versions) == {"e@1", "e/a", "e/c"}
    named = replace(NEWEST, texts=("../registry/e/versions/000001/model.safetensors",))
    assert gone(named, *runs[1:], versions=versions) == {"e/a", "e/c"}
