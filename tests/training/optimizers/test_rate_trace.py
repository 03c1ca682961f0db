"""The trace of learning rates: small, true, and the same whatever stood between."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from holdfast.training.optimizers.rate_trace import MAX_POINTS, RateTrace


def rate(step: int) -> float:
    return 1.0 / (1 + step)


@given(
    num_steps=st.integers(1, 3000),
    stops=st.sets(st.integers(0, 3000), max_size=5),
    num_steps_per_epoch=st.integers(1, 700),
)
def test_a_trace_keeps_true_rates_evenly_however_often_it_is_interrupted(
    num_steps: int, stops: set[int], num_steps_per_epoch: int
) -> None:
    trace, calm = RateTrace(), RateTrace()
    for step in range(num_steps):
        if step in stops:
            trace = RateTrace.restored(json.loads(json.dumps(trace.state_dict())))
        if step % num_steps_per_epoch == 0:
            trace.record(step, -1.0)  # the rate before the epoch's end changed it
        trace.record(step, rate(step))
        calm.record(step, rate(step))
    assert trace == calm
    assert trace.points == [(step, rate(step)) for step in range(0, num_steps, trace.every)]
    assert len(trace.points) <= MAX_POINTS
    assert trace.every == 1 or len(trace.points) >= MAX_POINTS // 2


def test_a_checkpoint_from_before_there_were_traces_is_traced_from_there_on() -> None:
    trace = RateTrace.restored(None)
    for step in range(700, 1400):
        trace.record(step, rate(step))
    assert trace.points == [(step, rate(step)) for step in range(700, 1400, trace.every)]
