"""What checking an export takes, by how much it grows with the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export_cost import measure

HEAVY = Path(__file__).with_name("heavy_experiments.py")
CONSTANT_MB = 25.0  # with the weights of wide digits, one evaluation batch between two layers
PARTS_MB = (
    150.0  # further, 16 MB of what a part is given and returns, and what is made to compare it
)


@pytest.mark.slow
def test_the_largest_process_of_an_export_grows_by_four_times_the_weights() -> None:
    few = ("export.num_latency_runs=10",)
    light, heavy = (measure(f"{HEAVY}:{name}", few) for name in ("Light", "Heavy"))
    growth_mb, weights_mb = heavy.peak_mb - light.peak_mb, heavy.weights_mb - light.weights_mb
    print(f"{growth_mb:.0f} MB more for {weights_mb:.1f} MB more of weights")
    assert weights_mb > 60
    assert growth_mb <= 4 * weights_mb + CONSTANT_MB


@pytest.mark.slow
def test_an_export_of_wide_layers_grows_by_four_times_the_weights() -> None:
    small, wide = measure("digits", ()), measure("digits", ("experiment.width=256",))
    growth_mb, weights_mb = wide.peak_mb - small.peak_mb, wide.weights_mb - small.weights_mb
    print(f"{growth_mb:.0f} MB more for {weights_mb:.1f} MB more of weights")
    assert growth_mb <= 4 * weights_mb + CONSTANT_MB


@pytest.mark.slow
def test_an_export_in_parts_grows_by_no_more_than_samples_of_16_mb_further() -> None:
    # Of 192 samples, what goes into the decoding step and comes out takes 50 MB.
    small, wide = (
        measure("language_model", ()),
        measure("language_model", ("experiment.width=256",)),
    )
    growth_mb, weights_mb = wide.peak_mb - small.peak_mb, wide.weights_mb - small.weights_mb
    print(f"{growth_mb:.0f} MB more for {weights_mb:.1f} MB more of weights")
    assert growth_mb <= 4 * weights_mb + CONSTANT_MB + PARTS_MB
