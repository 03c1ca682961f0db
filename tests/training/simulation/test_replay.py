"""The simulator against a real training on machines that come and go."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.training.configuration.schema import CheckpointConfig
from holdfast.training.simulation.capacity import Machine, Trace, TraceCapacity
from tests.training.simulation.replay import Replay, paced_run, simulated

NOTICE_S = 3.0
EVERY_EPOCHS = 20
# Two are told before, two vanish; between the third and the fourth nobody is there.
TRACE = Trace(
    (
        Machine(0.0, 25.0, NOTICE_S),
        Machine(5.0, 50.0),
        Machine(40.0, 75.0, NOTICE_S),
        Machine(80.0, 100.0),
        Machine(90.0, 900.0),
    ),
    900.0,
)


@pytest.mark.slow
def test_a_replay_takes_the_time_that_was_reckoned(tmp_path: Path) -> None:
    checkpoint = CheckpointConfig(mean_time_between_preemptions_s=20.0)
    overrides = (
        "train.num_epochs=200",
        "train.num_threads=1",
        f"checkpoint.every_epochs={EVERY_EPOCHS}",
        "checkpoint.mean_time_between_preemptions_s=20.0",
    )
    real = Replay(paced_run(tmp_path, "replayed"))
    real.play(TraceCapacity(TRACE, 0.0), overrides, NOTICE_S)
    found = simulated(real.costs(EVERY_EPOCHS), TRACE, checkpoint)
    difference = found.total_s / real.finish_s - 1
    print(f"replayed {real.finish_s:.1f} s, reckoned {found.total_s:.1f} s ({difference:+.1%})")
    assert real.num_told + real.num_vanished >= 2
    assert abs(difference) < 0.15
    assert abs(found.goodput - real.spent.useful_s / real.lived_s) < 0.15
    assert abs(found.num_segments - len(real.started_s)) <= 1
