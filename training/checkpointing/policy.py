"""When to save and what to keep. Pure: values go in, decisions come out, nothing is touched.

Retention is a union: a checkpoint stays as long as one policy wants it. Whatever the policies say,
the newest full checkpoint stays in full, since the next resume starts there. What is wanted for
its weights alone is slimmed.

Only checkpoints whose step alone decided that they are validated and saved can be selected: those
of ends of epochs, and light ones. When the others are written depends on the clock, on notices, and
on keys that may differ between two segments, and two runs that were interrupted differently must
still end with the same champion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol

from holdfast.training.configuration.schema import (
    CheckpointConfig,
    EmaConfig,
    SelectionConfig,
    SpikesConfig,
)
from holdfast.training.runs.directory import SegmentRecord, ledger_outcome, segment_duration_s

Trigger = Literal["epoch", "light", "threshold", "steps", "time", "notice", "end"]
Kind = Literal["full", "weights"]

ASSUMED_SAVE_S = 1.0
"""Cost of a save before the first one was measured; it only decides when the first one comes."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What retention knows of a committed, good checkpoint.

    Attributes:
        step: its step; no two checkpoints of a run share one.
        epoch: epochs that were finished when it was written.
        kind: ``full``; ``weights`` of a light one, and once it is slimmed.
        trigger: why it was written.
        metrics: validation metrics; empty where there was no validation.
    """

    step: int
    epoch: int = 0
    kind: Kind = "full"
    trigger: Trigger = "epoch"
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_selectable(self) -> bool:
        """Whether its weights may win."""
        return self.trigger in ("epoch", "light")


class Retention(Protocol):
    """One reason to keep checkpoints."""

    @property
    def needs(self) -> Kind:
        """What it needs of those that it keeps: all, or the weights alone."""
        ...

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """Steps to keep, of good checkpoints in any order. The same input, the same answer."""
        ...


@dataclass(frozen=True)
class KeepLast:
    """The newest ``num`` full checkpoints, for resuming."""

    num: int
    needs: ClassVar[Kind] = "full"

    def __post_init__(self) -> None:
        _require_positive("KeepLast.num", self.num)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """Slimmed ones are not counted: nothing can be resumed from them."""
        return set(sorted(info.step for info in infos if info.kind == "full")[-self.num :])


@dataclass(frozen=True)
class KeepTopK:
    """The ``k`` best selectable checkpoints by a validation metric; of equal ones the earlier.

    A checkpoint without the metric, or with NaN, is never among them.
    """

    k: int
    metric: str
    mode: Literal["min", "max"]
    needs: ClassVar[Kind] = "weights"

    def __post_init__(self) -> None:
        _require_positive("KeepTopK.k", self.k)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """What falls out of the best k never comes back, so deleting it is safe."""
        sign = 1.0 if self.mode == "min" else -1.0
        ranked = sorted((sign * value, step) for step, value in _measured(infos, self.metric))
        return {step for _, step in ranked[: self.k]}


@dataclass(frozen=True)
class KeepBest:
    """The best selectable checkpoint by a validation metric."""

    metric: str
    mode: Literal["min", "max"]
    needs: ClassVar[Kind] = "weights"

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """At most one step."""
        return KeepTopK(1, self.metric, self.mode).keep(infos)


@dataclass(frozen=True)
class KeepSnapshots:
    """The selectable checkpoints that end every ``num_epochs``-th epoch, whatever their metrics.

    Post-hoc averages are made from the moving averages in them.
    """

    num_epochs: int
    needs: ClassVar[Kind] = "weights"

    def __post_init__(self) -> None:
        _require_positive("KeepSnapshots.num_epochs", self.num_epochs)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """Decided by the epoch alone, so that interruptions do not change it."""
        return {i.step for i in infos if i.trigger == "epoch" and i.epoch % self.num_epochs == 0}


@dataclass(frozen=True)
class KeepEvery:
    """Each checkpoint whose step is a multiple of ``num_steps``, in full, for the archive."""

    num_steps: int
    needs: ClassVar[Kind] = "full"

    def __post_init__(self) -> None:
        _require_positive("KeepEvery.num_steps", self.num_steps)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """Steps that are such multiples."""
        return {info.step for info in infos if info.step % self.num_steps == 0}


@dataclass(frozen=True)
class KeepBehind:
    """Full checkpoints to go back to: one at least ``num_steps`` before any step that is to come.

    The newest one that is so old already; and the oldest after it, which will be.
    """

    num_steps: int
    needs: ClassVar[Kind] = "full"

    def __post_init__(self) -> None:
        _require_positive("KeepBehind.num_steps", self.num_steps)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """At most two steps."""
        steps = sorted(info.step for info in infos if info.kind == "full")
        behind = [step for step in steps if step <= steps[-1] - self.num_steps][-1:]
        ahead = [step for step in steps if not behind or step > behind[0]][:1]
        return {*behind, *ahead}


@dataclass(frozen=True)
class KeepCrossing:
    """The first checkpoint of the end of an epoch whose metric reached a threshold, in full.

    Attributes:
        metric: name of a validation metric.
        threshold: the value that counts as reached.
        side: ``above`` for values of at least the threshold, ``below`` for at most.
    """

    metric: str
    threshold: float
    side: Literal["above", "below"]
    needs: ClassVar[Kind] = "full"

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[int]:
        """At most one step."""
        ends = (info for info in infos if info.trigger in ("epoch", "threshold"))
        return set(sorted(info.step for info in ends if self.is_reached(info.metrics))[:1])

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether these metrics are at the threshold or beyond; a NaN is not."""
        value = metrics.get(self.metric, math.nan)
        return value >= self.threshold if self.side == "above" else value <= self.threshold

    def is_newly_reached(self, validations: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last of a run's validations is the first that reached the threshold."""
        *earlier, last = validations
        return self.is_reached(last) and not any(map(self.is_reached, earlier))


@dataclass(frozen=True)
class RetentionPlan:
    """What to do to the checkpoints of a run.

    Attributes:
        delete: steps that nothing wants, ascending.
        slim: steps of full checkpoints that are wanted for their weights alone, ascending.
    """

    delete: tuple[int, ...]
    slim: tuple[int, ...]


def plan_retention(infos: Sequence[CheckpointInfo], policies: Iterable[Retention]) -> RetentionPlan:
    """What the policies together want done. Nothing, for what is left once it was done.

    Args:
        infos: all committed checkpoints that are good, in any order.
        policies: reasons to keep; with none, the newest full checkpoint is all that stays.
    """
    wanted: dict[Kind, set[int]] = {"full": newest_full(infos), "weights": set()}
    for policy in policies:
        wanted[policy.needs] |= policy.keep(infos)
    kept = wanted["full"] | wanted["weights"]
    return RetentionPlan(
        delete=tuple(sorted({info.step for info in infos} - kept)),
        slim=tuple(
            sorted(
                info.step
                for info in infos
                if info.kind == "full" and info.step in kept - wanted["full"]
            )
        ),
    )


def expired(infos: Sequence[CheckpointInfo], policies: Iterable[Retention]) -> set[int]:
    """Steps that no policy wants. Never holds the newest full checkpoint."""
    return set(plan_retention(infos, policies).delete)


def to_slim(infos: Sequence[CheckpointInfo], policies: Iterable[Retention]) -> set[int]:
    """Steps of full checkpoints of which the weights are enough."""
    return set(plan_retention(infos, policies).slim)


def newest_full(infos: Sequence[CheckpointInfo]) -> set[int]:
    """The step that the next resume starts from; empty where there is none."""
    return KeepLast(1).keep(infos)


def build_retention(
    checkpoint: CheckpointConfig,
    selection: SelectionConfig,
    ema: EmaConfig,
    spikes: SpikesConfig = SpikesConfig(),  # noqa: B008  # it is frozen
) -> tuple[Retention, ...]:
    """The policies that a configuration asks for."""
    policies: list[Retention] = [
        KeepLast(checkpoint.keep_last),
        KeepTopK(selection.top_k, *selection.top_k_ranking),
    ]
    if selection.top_k_ranking != selection.ranking:
        policies.append(KeepBest(*selection.ranking))
    if ema.posthoc_gammas:
        policies.append(KeepSnapshots(ema.posthoc_snapshot_epochs))
    if checkpoint.keep_every_steps is not None:
        policies.append(KeepEvery(checkpoint.keep_every_steps))
    if spikes.num_left_out is not None:
        policies.append(KeepBehind(spikes.num_left_out))
    return (*policies, *build_crossings(checkpoint))


def build_crossings(checkpoint: CheckpointConfig) -> tuple[KeepCrossing, ...]:
    """The thresholds that a configuration names."""
    above = [KeepCrossing(*named, "above") for named in sorted(checkpoint.keep_above.items())]
    below = [KeepCrossing(*named, "below") for named in sorted(checkpoint.keep_below.items())]
    return (*above, *below)


class SaveMoment(NamedTuple):
    """Where training stands when it asks whether to save.

    Attributes:
        step: steps that are done.
        epoch: epochs that are finished.
        is_epoch_end: whether this step was the last of its epoch.
        now_s: monotonic time.
        last_save_s: monotonic time of the last save's start; the segment's start if there is none.
        last_save_step: step of the last save or restore.
        is_in_flight: whether a save is still being written.
        has_advance_notice: whether a notice asks to bring the next save forward.
    """

    step: int
    epoch: int
    is_epoch_end: bool
    now_s: float
    last_save_s: float
    last_save_step: int
    is_in_flight: bool = False
    has_advance_notice: bool = False


@dataclass(frozen=True)
class SaveSchedule:
    """When to save. The triggers combine; the end of an epoch is asked first.

    Attributes:
        every_epochs: save after so many epochs.
        every_steps: save after so many steps, or None.
        every_s: save when so many seconds have passed, or None.
        is_auto: save at the interval of Young and Daly.
        max_overhead: largest fraction of time that ``is_auto`` spends saving.
        weights_every_steps, weights_every_epochs: save light checkpoints, or None.
    """

    every_epochs: int = 1
    every_steps: int | None = None
    every_s: float | None = None
    is_auto: bool = False
    max_overhead: float = 0.01
    weights_every_steps: int | None = None
    weights_every_epochs: int | None = None

    def is_light_due(self, step: int, epoch: int, *, is_epoch_end: bool) -> bool:
        """Whether weights are validated and saved after this step, as it alone decides."""
        steps, epochs = self.weights_every_steps, self.weights_every_epochs
        is_of_steps = steps is not None and step % steps == 0
        return is_of_steps or (is_epoch_end and epochs is not None and epoch % epochs == 0)

    def due(
        self,
        moment: SaveMoment,
        *,
        cost_s: float | None,
        mtbp_s: float,
        upload_s: float = math.inf,
    ) -> Trigger | None:
        """Why to save now, or None.

        A save because of the time is skipped while another one is being written: it would only
        make training wait. It is due again at the next step.

        Args:
            moment: where training stands.
            cost_s: measured seconds that a save takes from training; None before the first one.
            mtbp_s: mean time between preemptions.
            upload_s: what a checkpoint takes on its way to the store, where that is longer than a
                grace period; infinite where it is not.
        """
        if moment.is_epoch_end and moment.epoch % self.every_epochs == 0:
            return "epoch"
        if moment.step <= moment.last_save_step:
            return None
        if self.every_steps is not None and moment.step % self.every_steps == 0:
            return "steps"
        is_time = moment.has_advance_notice or (
            moment.now_s - moment.last_save_s >= self.interval_s(cost_s, mtbp_s, upload_s)
        )
        return "time" if is_time and not moment.is_in_flight else None

    def interval_s(self, cost_s: float | None, mtbp_s: float, upload_s: float = math.inf) -> float:
        """Seconds between two saves that are due to the time alone; infinite for never."""
        interval_s = math.inf if self.every_s is None else self.every_s
        if not self.is_auto:
            return interval_s
        assumed_s = ASSUMED_SAVE_S if cost_s is None else cost_s
        own_s = young_daly_interval_s(assumed_s, mtbp_s, self.max_overhead)
        return min(interval_s, own_s, max(upload_s, assumed_s / self.max_overhead))


def build_schedule(checkpoint: CheckpointConfig) -> SaveSchedule:
    """The schedule that a configuration asks for."""
    return SaveSchedule(
        every_epochs=checkpoint.every_epochs,
        every_steps=checkpoint.every_steps,
        every_s=checkpoint.every_s,
        is_auto=checkpoint.is_auto,
        max_overhead=checkpoint.max_overhead,
        weights_every_steps=checkpoint.weights_every_steps,
        weights_every_epochs=checkpoint.weights_every_epochs,
    )


def young_daly_interval_s(cost_s: float, mtbp_s: float, max_overhead: float) -> float:
    """The interval between saves that loses the least time: sqrt(2 * cost * mean time).

    Short intervals pay for saves, long ones for work that is done again: half an interval per
    preemption. J. W. Young, "A first order approximation to the optimum checkpoint interval",
    CACM 17(9), 1974; J. T. Daly, "A higher order estimate of the optimum checkpoint interval for
    restart dumps", FGCS 22(3), 2006. Never shorter than ``cost_s / max_overhead``.
    """
    assert cost_s >= 0
    assert mtbp_s > 0
    assert max_overhead > 0
    return max(math.sqrt(2.0 * cost_s * mtbp_s), cost_s / max_overhead)


def mean_time_between_preemptions_s(records: Sequence[SegmentRecord], default_s: float) -> float:
    """Mean time between preemptions, from a run's own segments that have ended.

    Args:
        records: segments before the one that asks. One that says ``running`` was killed.
        default_s: what to assume before the first preemption.
    """
    num_preempted = sum(
        ledger_outcome(record, is_alive=False) in ("preempted", "killed") for record in records
    )
    lived_s = sum(segment_duration_s(record) for record in records)
    return estimated_mean_time_s(lived_s, num_preempted, default_s)


def estimated_mean_time_s(lived_s: float, num_preempted: int, default_s: float) -> float:
    """Mean time between preemptions of segments that lived so long, all of them together.

    The maximum likelihood estimate for exponential times, some of which ended otherwise.
    ``default_s`` counts as one more preemption, so that one early death does not decide alone, and
    so that the estimate begins with it.
    """
    return (default_s + lived_s) / (1 + num_preempted)


def _measured(infos: Sequence[CheckpointInfo], metric: str) -> list[tuple[int, float]]:
    """(step, value) of each selectable checkpoint that has the metric as a number."""
    return [
        (info.step, info.metrics[metric])
        for info in infos
        if info.is_selectable and not math.isnan(info.metrics.get(metric, math.nan))
    ]


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, found {value}")
