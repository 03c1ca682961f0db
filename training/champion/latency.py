"""How long one call takes: p50 and p99, measured in turn with a call of another model."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from holdfast.training.configuration.schema import Json

BATCH_SIZES = (1, 64)
NUM_WARM_UP = 5
MIN_RUNS = 15
MAX_S = 4.0  # for one artifact and batch size; large models are not timed for minutes
Inputs = tuple[Tensor, ...]
Runner = Callable[[Inputs], object]


def measure(
    run: Runner, other: Runner, rows: Inputs, num_runs: int, beside: str = "eager"
) -> dict[str, Json]:
    """``{"batch-1": {"p50_ms", "p99_ms", "eager_p50_ms", "eager_p99_ms"}, "batch-64": …}``.

    The two are called alternately, so that both see the same load of the machine. ``beside`` is
    what the other one is called.
    """
    measured: dict[str, Json] = {}
    for size in BATCH_SIZES:
        chosen = torch.arange(size) % len(rows[0])
        inputs = tuple(tensor[chosen] for tensor in rows)
        times_s = _alternate((run, other), inputs, num_runs)
        p50, p99 = np.percentile(np.array(times_s) * 1e3, (50, 99), axis=1).round(4)
        measured[f"batch-{size}"] = {
            f"{beside}_p50_ms": float(p50[1]),
            f"{beside}_p99_ms": float(p99[1]),
            "p50_ms": float(p50[0]),
            "p99_ms": float(p99[0]),
        }
    return measured


def _alternate(runners: tuple[Runner, Runner], inputs: Inputs, num_runs: int) -> list[list[float]]:
    times_s: list[list[float]] = [[], []]
    begin_s = time.monotonic()
    with torch.inference_mode():
        for number in range(num_runs + NUM_WARM_UP):
            if number > MIN_RUNS and time.monotonic() - begin_s > MAX_S:
                break
            for run, kept in zip(runners, times_s, strict=True):
                start_s = time.perf_counter()
                run(inputs)
                if number >= NUM_WARM_UP:
                    kept.append(time.perf_counter() - start_s)
    return times_s
