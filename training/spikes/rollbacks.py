"""What was decided for a spike: which steps are left out, in ``rollbacks.json`` and in the state.

Which they are depends on the step of the spike alone. From whatever checkpoint before them training
goes on, it comes to the same state: so a run that is killed between any two of these acts, and one
that is not, end with the same bytes.

1. The decision is written, as the run's writer.
2. The process starts anew, and what was made of the steps from the first left-out one on goes:
   their checkpoints, and their losses.
3. The newest checkpoint that is left is restored. The steps that are left out are counted, move
   the learning rate, and do nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdfast.training.configuration.schema import SpikesConfig
from holdfast.training.errors import ConfigError, DataFormatError, LossJumpError
from holdfast.training.runs.faultpoints import reach
from holdfast.training.runs.fenced import publish_bytes, publish_json, take_away
from holdfast.training.runs.lease import Lease
from holdfast.training.runs.losses import BYTES_PER_STEP, loss_files
from holdfast.training.runs.paths import RunDirectory
from holdfast.training.runs.stored_json import read_json, required_fields, shape_expected

FORMAT_VERSION = 1
FIELDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "first": (int,),
    "reason": (str,),
    "segment": (int,),
}


@dataclass(frozen=True)
class Rollback:
    """One spike, and the steps that are left out for it.

    Attributes:
        step: the step of the spike, which is the last that is left out.
        first: the first one.
        reason: what was wrong with the loss.
        segment: the segment that found it: what that one and those before made of these steps is
            of no use any more.
    """

    step: int
    first: int
    reason: str
    segment: int

    def as_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: which segment found it depends on interruptions."""
        return {name: value for name, value in asdict(self).items() if name != "segment"}


class LeftOut:
    """All rollbacks of a run, in the order in which they were decided."""

    def __init__(self, rollbacks: Iterable[Rollback] = ()) -> None:
        self._rollbacks = tuple(rollbacks)

    def __iter__(self) -> Iterator[Rollback]:
        return iter(self._rollbacks)

    def __len__(self) -> int:
        return len(self._rollbacks)

    def __contains__(self, step: int) -> bool:
        return any(one.first <= step <= one.step for one in self._rollbacks)

    def num_within(self, first: int, last: int) -> int:
        """How many steps from ``first`` to ``last`` are left out."""
        if not self._rollbacks:
            return 0
        return sum(step in self for step in range(first, last + 1))

    def as_state(self, step: int) -> list[dict[str, Any]]:
        """Those that the state after a step has in it."""
        return [one.as_state() for one in self._rollbacks if one.first <= step]

    def joined(self, of_state: Sequence[dict[str, Any]]) -> LeftOut:
        """With those that a checkpoint brought along, as that of a fork does; none is there twice.

        What a checkpoint brought was decided before anything that the run decided itself.
        """
        known = [one.as_state() for one in self._rollbacks]
        brought = [Rollback(**one, segment=0) for one in of_state if one not in known]
        return LeftOut([*brought, *self._rollbacks])


def read_rollbacks(run: RunDirectory) -> LeftOut:
    """What the run has decided; nothing for most runs. Raises DataFormatError or StorageError."""
    path = run.rollbacks_json
    try:
        value: Any = read_json(path)
    except FileNotFoundError:
        return LeftOut()
    with shape_expected(path):
        if value["format_version"] != FORMAT_VERSION:
            raise DataFormatError(
                f"{path} has format version {value['format_version']!r}, this Holdfast reads "
                f"{FORMAT_VERSION}: use the Holdfast that wrote it, or a newer one"
            )
        return LeftOut(
            Rollback(**required_fields(one, str(path), FIELDS)) for one in value["rollbacks"]
        )


def decide(
    config: SpikesConfig,
    left_out: LeftOut,
    step: int,
    reason: str,
    *,
    segment: int,
    begin_step: int,
    epoch_ends: Iterable[int],
) -> Rollback:
    """Which steps are left out for a spike.

    Args:
        config: says how many.
        left_out: what was decided before.
        step: of the spike.
        reason: what is wrong with its loss.
        segment: that found it.
        begin_step: before which nothing can be left out: 0, or the checkpoint of a fork.
        epoch_ends: the last step of each epoch, in order.

    Raises:
        LossJumpError: there were ``max_rollbacks`` already.
        ConfigError: an epoch would have no step any more.
    """
    assert config.num_left_out is not None
    if len(left_out) >= config.max_rollbacks:
        steps = ", ".join(str(one.step) for one in left_out) or "none"
        raise LossJumpError(
            f"{reason}; {len(left_out)} times training went back already (spikes at steps {steps}),"
            f" and spikes.max_rollbacks={config.max_rollbacks} allows no more: lower the learning "
            f"rate, clip gradients, or look at the data",
            step=step,
            loss=float("nan"),
        )
    first = max(begin_step + 1, step - config.num_left_out + 1)
    found = Rollback(step=step, first=first, reason=reason, segment=segment)
    _require_steps(LeftOut([*left_out, found]), found, epoch_ends)
    return found


def require_shorter_than_epochs(config: SpikesConfig, epoch_lengths: Iterable[int]) -> None:
    """Raise ConfigError where what is left out for one spike may be a whole epoch."""
    if config.num_left_out is None:
        return
    for number, num_steps in enumerate(epoch_lengths):
        if config.num_left_out >= num_steps:
            raise ConfigError(
                f"spikes.num_left_out={config.num_left_out} can empty epoch {number}, which has "
                f"{num_steps} steps: leave out fewer"
            )


def publish(run: RunDirectory, lease: Lease, left_out: Iterable[Rollback]) -> None:
    """Write what is decided, as the run's writer. Durable after return."""
    rollbacks = [asdict(one) for one in left_out]
    reach("spike.before-decision")
    publish_json(
        lease, run.rollbacks_json, {"format_version": FORMAT_VERSION, "rollbacks": rollbacks}
    )
    reach("spike.after-decision")


def forget_losses(run: RunDirectory, lease: Lease, left_out: LeftOut) -> None:
    """Take away the losses of steps that are done otherwise now. Again, it finds nothing to do."""
    for one in left_out:
        for file in loss_files(run):
            if file.segment > one.segment or file.end_step < one.first or not file.num_steps:
                continue
            reach("spike.before-losses")
            num_kept = max(0, one.first - file.first_step)
            if num_kept:
                content = file.path.read_bytes()[: num_kept * BYTES_PER_STEP]
                publish_bytes(lease, file.path, content)
            else:
                take_away(lease, file.path)


def _require_steps(left_out: LeftOut, newest: Rollback, epoch_ends: Iterable[int]) -> None:
    begin = 0
    for number, end in enumerate(epoch_ends):
        if begin >= newest.step:
            return
        if end >= newest.first and left_out.num_within(begin + 1, end) == end - begin:
            raise ConfigError(
                f"{newest.reason}; to leave out steps {newest.first} to {newest.step} as well "
                f"would empty epoch {number} (steps {begin + 1} to {end}): leave out fewer by "
                f"spikes.num_left_out, lower the learning rate, or look at the data"
            )
        begin = end
