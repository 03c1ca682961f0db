"""Which loss is a spike depends on the losses before it, and not on when anybody looks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from holdfast.training.checkpointing.policy import CheckpointInfo, KeepBehind, newest_full
from holdfast.training.configuration.schema import SpikesConfig
from holdfast.training.errors import LossJumpError, NonFiniteLossError
from holdfast.training.spikes.rollbacks import LeftOut, Rollback
from holdfast.training.spikes.watch import SpikeWatch

CONFIG = SpikesConfig(num_left_out=2, max_jump=3.0, window_steps=4)
LATER = torch.device("cuda")  # losses wait, as on a GPU; none is touched


def first_spike(
    losses: Sequence[float], device: torch.device, check_every: int = 1000
) -> int | None:
    watch = SpikeWatch(CONFIG, device)
    try:
        for step, loss in enumerate(losses, 1):
            watch.observe(torch.tensor(loss), step)
            if step % check_every == 0:
                watch.check()
        watch.check()
    except (LossJumpError, NonFiniteLossError) as error:
        return error.step
    return None


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([1, 1, 1, 1, 2.9], None),
        ([1, 1, 1, 1, 3.1], 5),
        ([1, 1, 9], None),  # too few before it
        ([1, 1, float("nan"), 1], 3),
        ([1, float("-inf")], 2),
        ([-1, -1, -1, -1, -9], 5),
        ([0, 0, 0, 0, 1e-9], 5),
        ([8, 8, 8, 8, 2, 2, 2, 2, 2, 2, 2, 2, 9], 13),
        ([1, 1, 1, 1, 9, float("nan")], 5),
        ([1, 1, 1, 1, float("nan"), 9], 5),
    ],
)
def test_the_first_spike_is_found_whenever_one_looks(
    losses: Sequence[float], step: int | None
) -> None:
    assert first_spike(losses, torch.device("cpu")) == step
    for check_every in (1, 2, 3, 1000):
        assert first_spike(losses, LATER, check_every) == step


def test_a_watch_that_was_put_back_judges_as_the_one_before() -> None:
    one, other = (SpikeWatch(CONFIG, torch.device("cpu")) for _ in range(2))
    for step in range(1, 6):
        one.observe(torch.tensor(0.1 * step), step)
    other.restore(one.state())
    for watch in (one, other):
        watch.observe(torch.tensor(0.7), 6)
    assert one.state() == other.state()
    with pytest.raises(LossJumpError, match="times the mean of those before"):
        other.observe(torch.tensor(5.0), 7)


def test_left_out_steps_are_counted_once() -> None:
    left_out = LeftOut([Rollback(10, 6, "", 1), Rollback(12, 8, "", 2)])
    assert [step for step in range(20) if step in left_out] == list(range(6, 13))
    assert left_out.num_within(1, 20) == 7
    assert left_out.num_within(9, 10) == 2
    assert [one["step"] for one in left_out.as_state(7)] == [10]
    assert [one["step"] for one in left_out.as_state(8)] == [10, 12]


def test_what_a_fork_brings_is_there_once() -> None:
    own = LeftOut([Rollback(12, 8, "b", 2)])
    brought = LeftOut([Rollback(10, 6, "a", 7), Rollback(12, 8, "b", 9)]).as_state(20)
    assert [(one.step, one.segment) for one in own.joined(brought)] == [(10, 0), (12, 2)]


@pytest.mark.parametrize("every", [1, 3, 10, 25])
def test_one_that_is_old_enough_is_always_kept(every: int) -> None:
    kept: list[int] = []
    policy = KeepBehind(20)
    for step in range(1, 400):
        if step % every == 0:
            infos = [CheckpointInfo(one) for one in (*kept, step)]
            kept = sorted(policy.keep(infos) | newest_full(infos))
            assert len(kept) <= 3
        first = every
        if step - 20 >= first:
            assert any(one <= step - 20 for one in kept)
            assert step - max(one for one in kept if one <= step - 20) <= 40 + 2 * every
