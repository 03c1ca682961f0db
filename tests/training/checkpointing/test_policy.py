from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.checkpointing.policy import (
    CheckpointInfo,
    KeepBest,
    KeepCrossing,
    KeepEvery,
    KeepLast,
    KeepSnapshots,
    KeepTopK,
    Kind,
    Retention,
    SaveMoment,
    SaveSchedule,
    Trigger,
    build_retention,
    build_schedule,
    expired,
    mean_time_between_preemptions_s,
    newest_full,
    plan_retention,
    to_slim,
    young_daly_interval_s,
)
from holdfast.training.configuration.schema import CheckpointConfig, EmaConfig, SelectionConfig
from holdfast.training.runs.directory import SegmentRecord

METRICS = ("loss", "accuracy")
values = st.floats(allow_nan=True, allow_infinity=True, width=16)
infos_lists = st.lists(
    st.builds(
        CheckpointInfo,
        step=st.integers(0, 60),
        kind=st.sampled_from(get_args(Kind)),
        trigger=st.sampled_from(get_args(Trigger)),
        metrics=st.dictionaries(st.sampled_from(METRICS), values),
    ),
    max_size=20,
    unique_by=lambda info: info.step,
)
retentions: st.SearchStrategy[Retention] = st.one_of(
    st.builds(KeepLast, st.integers(1, 5)),
    st.builds(
        KeepTopK, st.integers(1, 5), st.sampled_from(METRICS), st.sampled_from(["min", "max"])
    ),
    st.builds(KeepBest, st.sampled_from(METRICS), st.sampled_from(["min", "max"])),
    st.builds(KeepEvery, st.integers(1, 7)),
    st.builds(KeepCrossing, st.sampled_from(METRICS), values, st.sampled_from(["above", "below"])),
)
retention_lists = st.lists(retentions, max_size=4)


def epoch_end(step: int, **metrics: float) -> CheckpointInfo:
    return CheckpointInfo(step=step, epoch=step, metrics=metrics)


def carried_out(infos: list[CheckpointInfo], policies: list[Retention]) -> list[CheckpointInfo]:
    """The checkpoints after a plan was carried out."""
    plan = plan_retention(infos, policies)
    return [
        CheckpointInfo(
            info.step,
            info.epoch,
            "weights" if info.step in plan.slim else info.kind,
            info.trigger,
            info.metrics,
        )
        for info in infos
        if info.step not in plan.delete
    ]


@given(infos_lists, retention_lists)
def test_what_a_policy_protects_never_goes(
    infos: list[CheckpointInfo], policies: list[Retention]
) -> None:
    gone, slimmed = expired(infos, policies), to_slim(infos, policies)
    for policy in policies:
        assert not policy.keep(infos) & gone
        if policy.needs == "full":
            assert not policy.keep(infos) & slimmed


@given(infos_lists, retention_lists)
def test_the_newest_full_checkpoint_never_goes_and_is_never_slimmed(
    infos: list[CheckpointInfo], policies: list[Retention]
) -> None:
    newest = newest_full(infos)
    assert len(newest) == any(info.kind == "full" for info in infos)
    assert not newest & (expired(infos, policies) | to_slim(infos, policies))


@given(infos_lists, retention_lists)
def test_carrying_a_plan_out_leaves_nothing_to_do(
    infos: list[CheckpointInfo], policies: list[Retention]
) -> None:
    plan = plan_retention(carried_out(infos, policies), policies)
    assert (plan.delete, plan.slim) == ((), ())


@given(infos_lists, retention_lists, st.randoms(use_true_random=False))
def test_a_plan_does_not_depend_on_the_order_of_the_checkpoints(
    infos: list[CheckpointInfo], policies: list[Retention], random: Any
) -> None:
    shuffled = random.sample(infos, len(infos))
    assert plan_retention(shuffled, policies) == plan_retention(infos, policies)


@given(infos_lists, retention_lists)
def test_a_plan_is_of_existing_steps_and_says_each_once(
    infos: list[CheckpointInfo], policies: list[Retention]
) -> None:
    plan = plan_retention(infos, policies)
    assert not set(plan.delete) & set(plan.slim)
    full = {info.step for info in infos if info.kind == "full"}
    assert set(plan.slim) <= full
    assert set(plan.delete) <= {info.step for info in infos}


@given(infos_lists, st.integers(1, 4), st.sampled_from(["min", "max"]))
def test_pruning_while_training_keeps_the_same_best_as_pruning_at_the_end(
    infos: list[CheckpointInfo], k: int, mode: Any
) -> None:
    policies: list[Retention] = [KeepLast(1), KeepTopK(k, "loss", mode)]
    present: list[CheckpointInfo] = []
    for info in sorted(infos, key=lambda info: info.step):
        present = carried_out([*present, info], policies)
    assert policies[1].keep(present) == policies[1].keep(infos)


@given(infos_lists, st.floats(allow_nan=False, width=16), st.sampled_from(["above", "below"]))
def test_the_first_crossing_stays_the_first_while_training(
    infos: list[CheckpointInfo], threshold: float, side: Any
) -> None:
    policies: list[Retention] = [KeepCrossing("loss", threshold, side)]
    present: list[CheckpointInfo] = []
    for info in sorted(infos, key=lambda info: info.step):
        present = carried_out([*present, info], policies)
    assert policies[0].keep(present) == policies[0].keep(infos)


@given(infos_lists, st.integers(1, 5), st.sampled_from(["min", "max"]))
def test_nothing_that_cannot_be_selected_is_among_the_best(
    infos: list[CheckpointInfo], k: int, mode: Any
) -> None:
    kept = KeepTopK(k, "loss", mode).keep(infos)
    assert len(kept) <= k
    for info in infos:
        if info.step in kept:
            assert info.trigger in ("epoch", "light")
            assert not math.isnan(info.metrics["loss"])


def test_keep_last_counts_full_checkpoints_only() -> None:
    infos = [
        CheckpointInfo(1),
        CheckpointInfo(2),
        CheckpointInfo(3, kind="weights"),
        CheckpointInfo(4, trigger="time"),
    ]
    assert KeepLast(2).keep(infos) == {2, 4}
    assert KeepLast(9).keep(infos) == {1, 2, 4}


def test_of_equally_good_checkpoints_the_earlier_wins() -> None:
    infos = [epoch_end(3, loss=0.5), epoch_end(1, loss=0.5), epoch_end(2, loss=0.5)]
    assert KeepBest("loss", "min").keep(infos) == {1}
    assert KeepBest("loss", "max").keep(infos) == {1}
    assert KeepTopK(2, "loss", "max").keep(infos) == {1, 2}


def test_the_mode_says_which_end_is_good() -> None:
    infos = [epoch_end(1, loss=1.0), epoch_end(2, loss=3.0), epoch_end(3, loss=2.0)]
    assert KeepTopK(2, "loss", "min").keep(infos) == {1, 3}
    assert KeepTopK(2, "loss", "max").keep(infos) == {2, 3}


def test_a_missing_or_nan_metric_is_never_best_but_infinity_is_a_number() -> None:
    infos = [epoch_end(1, loss=math.nan), epoch_end(2), epoch_end(3, loss=math.inf)]
    assert KeepTopK(3, "loss", "min").keep(infos) == {3}


def test_every_nth_is_kept_for_the_archive() -> None:
    infos = [CheckpointInfo(step) for step in (5, 10, 15, 20)]
    assert KeepEvery(10).keep(infos) == {10, 20}


def test_the_first_to_reach_a_threshold_is_kept_and_later_ones_are_not() -> None:
    infos = [epoch_end(step, accuracy=step / 10) for step in (9, 5, 3, 7)]
    assert KeepCrossing("accuracy", 0.5, "above").keep(infos) == {5}
    assert KeepCrossing("accuracy", 0.8, "below").keep(infos) == {3}
    assert KeepCrossing("accuracy", 0.95, "above").keep(infos) == set()


def test_a_threshold_is_of_ends_of_epochs_and_newly_reached_once() -> None:
    infos = [
        CheckpointInfo(3, trigger="light", metrics={"loss": 0.1}),
        CheckpointInfo(6, trigger="threshold", metrics={"loss": 0.2}),
        CheckpointInfo(9, trigger="epoch", metrics={"loss": 0.1}),
    ]
    below = KeepCrossing("loss", 0.2, "below")
    assert below.keep(infos) == {6}
    validations: list[dict[str, float]] = [{"loss": 0.5}, {"loss": math.nan}, {"loss": 0.2}]
    assert [below.is_newly_reached(validations[:n]) for n in (1, 2, 3)] == [False, False, True]
    assert not below.is_newly_reached([*validations, {"loss": 0.1}])
    assert not below.is_newly_reached([{"accuracy": 0.1}])


def test_what_was_saved_for_a_threshold_is_not_chosen_and_light_ones_are() -> None:
    triggers = get_args(Trigger)
    chosen = [trigger for trigger in triggers if CheckpointInfo(1, trigger=trigger).is_selectable]
    assert chosen == ["epoch", "light"]


def test_light_checkpoints_are_due_by_the_step_alone() -> None:
    schedule = SaveSchedule(weights_every_steps=4, weights_every_epochs=2)
    assert [s for s in range(1, 13) if schedule.is_light_due(s, 0, is_epoch_end=False)] == [
        4,
        8,
        12,
    ]
    assert [schedule.is_light_due(5, epoch, is_epoch_end=True) for epoch in (1, 2)] == [False, True]
    assert not SaveSchedule().is_light_due(4, 2, is_epoch_end=True)


def test_what_only_selection_wants_is_slimmed() -> None:
    infos = [epoch_end(step, loss=float(step)) for step in (1, 2, 3, 4)]
    plan = plan_retention(infos, [KeepLast(2), KeepBest("loss", "min")])
    assert (plan.delete, plan.slim) == ((2,), (1,))


def test_without_a_policy_the_newest_stays() -> None:
    infos = [CheckpointInfo(1), CheckpointInfo(2), CheckpointInfo(3, kind="weights")]
    assert plan_retention(infos, []).delete == (1, 3)
    assert plan_retention([], []).delete == ()


@pytest.mark.parametrize(
    "build", [KeepLast, KeepEvery, KeepSnapshots, lambda k: KeepTopK(k, "loss", "min")]
)
def test_keeping_none_is_refused_instead_of_meaning_all(build: Any) -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        build(0)


def test_snapshots_are_kept_by_epoch_whatever_their_metrics() -> None:
    infos = [
        CheckpointInfo(10, 1, metrics={"loss": 0.1}),
        CheckpointInfo(20, 2, metrics={"loss": 9.0}),
        CheckpointInfo(25, 2, trigger="time"),
        CheckpointInfo(30, 3, metrics={"loss": 0.2}),
        CheckpointInfo(40, 4, kind="weights"),
    ]
    assert KeepSnapshots(2).keep(infos) == {20, 40}


def test_the_configuration_builds_every_kind_of_policy() -> None:
    checkpoint = CheckpointConfig(
        keep_last=3, keep_every_steps=100, keep_above={"accuracy": 0.9}, keep_below={"loss": 0.1}
    )
    ema = EmaConfig(posthoc_gammas=(6.94,), posthoc_snapshot_epochs=4)
    assert build_retention(checkpoint, SelectionConfig(metric="loss", top_k=2), ema) == (
        KeepLast(3),
        KeepTopK(2, "loss", "min"),
        KeepSnapshots(4),
        KeepEvery(100),
        KeepCrossing("accuracy", 0.9, "above"),
        KeepCrossing("loss", 0.1, "below"),
    )


def test_the_best_k_may_be_by_another_metric_than_the_best() -> None:
    selection = SelectionConfig(
        metric="bleu", mode="max", top_k=2, top_k_metric="loss", top_k_mode="min"
    )
    assert build_retention(CheckpointConfig(), selection, EmaConfig()) == (
        KeepLast(2),
        KeepTopK(2, "loss", "min"),
        KeepBest("bleu", "max"),
    )


def moment(**changes: Any) -> SaveMoment:
    usual: dict[str, Any] = {
        "step": 10,
        "epoch": 0,
        "is_epoch_end": False,
        "now_s": 1000.0,
        "last_save_s": 990.0,
        "last_save_step": 5,
    }
    return SaveMoment(**{**usual, **changes})


def due(schedule: SaveSchedule, **changes: Any) -> Trigger | None:
    return schedule.due(moment(**changes), cost_s=1.0, mtbp_s=5000.0)


def test_nothing_is_due_between_the_triggers() -> None:
    assert due(SaveSchedule(every_steps=7, every_s=60.0, is_auto=True)) is None


def test_the_end_of_an_epoch_comes_before_every_other_trigger() -> None:
    schedule = SaveSchedule(every_steps=10, every_s=1.0)
    assert due(schedule, is_epoch_end=True, epoch=1, is_in_flight=True) == "epoch"


def test_an_epoch_end_counts_even_if_the_step_was_already_saved() -> None:
    """A notice may have been saved at that very step; selection still needs its metrics."""
    assert due(SaveSchedule(), is_epoch_end=True, epoch=1, last_save_step=10) == "epoch"


def test_every_second_epoch_is_every_second_epoch() -> None:
    schedule = SaveSchedule(every_epochs=2)
    assert [due(schedule, is_epoch_end=True, epoch=epoch) for epoch in (1, 2, 3, 4)] == [
        None,
        "epoch",
        None,
        "epoch",
    ]


def test_steps_are_due_at_multiples_whatever_the_place_of_a_resume() -> None:
    schedule = SaveSchedule(every_steps=5)
    assert due(schedule, step=10, last_save_step=8) == "steps"
    assert due(schedule, step=12, last_save_step=8) is None


def test_a_step_is_not_saved_twice() -> None:
    schedule = SaveSchedule(every_steps=5, every_s=1.0)
    assert due(schedule, step=10, last_save_step=10) is None


def test_time_is_due_after_its_interval_and_is_skipped_while_a_save_is_in_flight() -> None:
    schedule = SaveSchedule(every_s=10.0)
    assert due(schedule, now_s=999.9) is None
    assert due(schedule) == "time"
    assert due(schedule, is_in_flight=True) is None
    assert due(schedule, step=11, now_s=1001.0) == "time"


def test_an_advance_notice_brings_the_next_save_forward() -> None:
    assert due(SaveSchedule(), has_advance_notice=True) == "time"
    assert due(SaveSchedule(), has_advance_notice=True, is_in_flight=True) is None
    assert due(SaveSchedule(), has_advance_notice=True, last_save_step=10) is None


def test_auto_saves_at_the_interval_of_young_and_daly() -> None:
    schedule = SaveSchedule(is_auto=True)
    assert schedule.interval_s(1.0, 5000.0) == 100.0
    assert due(schedule, last_save_s=900.1) is None
    assert due(schedule, last_save_s=900.0) == "time"


def test_auto_and_a_fixed_interval_combine_to_the_shorter() -> None:
    assert SaveSchedule(is_auto=True, every_s=30.0).interval_s(1.0, 5000.0) == 30.0
    assert SaveSchedule(every_s=30.0).interval_s(1.0, 5000.0) == 30.0
    assert SaveSchedule().interval_s(1.0, 5000.0) == math.inf


def test_where_uploads_are_slow_the_time_between_saves_is_theirs_within_the_overhead() -> None:
    schedule = SaveSchedule(is_auto=True, max_overhead=0.01)
    assert schedule.interval_s(0.1, 50_000.0, upload_s=40.0) == 40.0
    assert schedule.interval_s(0.1, 50_000.0, upload_s=1.0) == 10.0  # 0.1 s are 1 % of it
    assert schedule.interval_s(0.1, 50_000.0, upload_s=1000.0) == 100.0  # as without
    assert SaveSchedule(every_s=60.0).interval_s(0.1, 50_000.0, upload_s=1.0) == 60.0


def test_auto_saves_before_the_first_cost_is_measured() -> None:
    assert SaveSchedule(is_auto=True).interval_s(None, 3600.0) < 200.0


def test_the_configuration_builds_the_schedule() -> None:
    config = CheckpointConfig(every_steps=3, every_s=4.0, every_epochs=5, max_overhead=0.02)
    assert build_schedule(config) == SaveSchedule(5, 3, 4.0, True, 0.02)


@given(st.floats(0, 1e4), st.floats(1, 1e7), st.floats(0.001, 1))
def test_the_overhead_of_auto_is_bounded(cost_s: float, mtbp_s: float, overhead: float) -> None:
    interval_s = young_daly_interval_s(cost_s, mtbp_s, overhead)
    assert cost_s <= overhead * interval_s * (1 + 1e-9)
    assert interval_s >= math.sqrt(2 * cost_s * mtbp_s)


@given(st.floats(0.01, 100), st.floats(1e4, 1e6))
def test_no_other_interval_loses_less_time(cost_s: float, mtbp_s: float) -> None:
    def lost_fraction(interval_s: float) -> float:
        return cost_s / interval_s + interval_s / (2 * mtbp_s)

    best_s = young_daly_interval_s(cost_s, mtbp_s, max_overhead=1.0)
    assert lost_fraction(best_s) <= min(lost_fraction(best_s * f) for f in (0.5, 0.9, 1.1, 2.0))


def segment(outcome: str, duration_s: float) -> SegmentRecord:
    is_killed = outcome == "running"
    return SegmentRecord.model_validate(
        {
            "number": 1,
            "started_at": "2026-01-01T00:00:00Z",
            "ended_at": None if is_killed else f"2026-01-01T00:{int(duration_s) // 60:02d}:00Z",
            "outcome": outcome,
            "costs_s": {"useful": duration_s} if is_killed else {},
            "host": "node",
            "pid": 1,
        }
    )


def test_the_mean_time_begins_with_the_assumption() -> None:
    assert mean_time_between_preemptions_s([], 3600.0) == 3600.0


def test_the_mean_time_comes_from_all_time_lived_over_the_preemptions() -> None:
    records = [segment("preempted", 600), segment("running", 300), segment("failed", 60)]
    assert mean_time_between_preemptions_s(records, 3600.0) == (3600 + 960) / 3


def test_with_many_segments_the_assumption_no_longer_matters() -> None:
    records = [segment("running", 600)] * 1000
    assert mean_time_between_preemptions_s(records, 3600.0) == pytest.approx(600, rel=0.01)
