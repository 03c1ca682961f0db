"""One small training of a kind that people really do, calm and stopped: the same bytes.

Every module beside this one holds experiments of one kind and the tests that run them.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from holdfast.training.exactness.trial import Trial
from holdfast.training.runs.losses import compare_losses
from holdfast.training.runs.paths import RunDirectory
from tests.faults.campaign import Segment, Training, complete, differences, final_state

STOPS = ((signal.SIGKILL, 7), (signal.SIGTERM, 16))
# Each step is told, so that a signal can follow it; a resume goes back by some steps.
OFTEN = ("logging.every_s=0.0001", "checkpoint.every_steps=3", "checkpoint.is_auto=false")
BUNDLE_STAGES = ("candidates", "evaluate", "export", "promote")
QUICK_EXPORT = ("export.num_latency_runs=10", 'export.formats=["weights","onnx"]')


def assert_exact(
    experiment: str,
    folder: Path,
    overrides: Sequence[str] = (),
    stops: Sequence[tuple[signal.Signals, int]] = STOPS,
) -> RunDirectory:
    """Train calm, and again with a signal after each of the given steps; compare the last bytes.

    ``experiment`` is ``path/to/file.py:Class``. Returns the calm run.
    """
    calm = Training(folder / "calm", "one", experiment, (*OFTEN, *overrides))
    complete(calm)
    stopped = Training(folder / "stopped", "one", experiment, (*OFTEN, *overrides))
    for number, step in stops:
        stop_after(stopped, number, step)
    complete(stopped)
    assert differences(final_state(calm.run), final_state(stopped.run)) == []
    compared = compare_losses(stopped.run)
    assert compared.num_different == 0
    assert compared.num_compared > 0 or signal.SIGKILL not in dict(stops)
    return calm.run


def stop_after(
    training: Training, number: signal.Signals, step: int, arguments: Sequence[str] = ()
) -> Segment:
    """Run a segment that sends itself a signal after ``step``, before that step can be saved."""
    trial = Trial(stop_at=step, stop_signal=number.name)
    segment = training.start(trial.environment(), arguments)
    code = segment.finish()
    expected = 75 if number == signal.SIGTERM else -number
    assert code == expected, f"exit code {code}\n{''.join(segment.errors)}"
    return segment


def assert_published(training: Training) -> RunDirectory:
    """Take a finished training to its bundle, in the registry. Returns the run."""
    for stage in BUNDLE_STAGES:
        segment = training.start(stage=stage)
        code = segment.finish()
        assert code == 0, f"{stage}: exit code {code}\n{''.join(segment.errors)}"
    return training.run
