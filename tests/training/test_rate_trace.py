"""The trace of learning rates: small, true, and the same whatever stood between."""

from __future__ import annotations

import json
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from training.rate_trace import MAX_RATES, RateTrace


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
            trace = RateTrace(**json.loads(json.dumps(asdict(trace))))
        if step % num_steps_per_epoch == 0:
            trace.record(step, -1.0)  # the rate before the epoch's end changed it
        trace.record(step, rate(step))
        calm.record(step, rate(step))
    assert trace == calm
    assert trace.points() == [(step, rate(step)) for step in range(0, num_steps, trace.every)]
    assert len(trace.rates) <= MAX_RATES
    assert trace.every == 1 or len(trace.rates) >= MAX_RATES // 2
