"""What checking an export takes, by how much it grows with the model."""

from __future__ import annotations

import pytest

from benchmarks.export_cost import measure

# Of wide digits: what lies between two layers for one evaluation batch, 256 samples in fp32, with
# the copy that a convolution makes of it.
BATCH_MB = 65.0


@pytest.mark.slow
def test_an_export_takes_four_times_the_weights_and_one_batch() -> None:
    small, wide = measure("digits", ()), measure("digits", ("experiment.width=256",))
    growth_mb, weights_mb = wide.peak_mb - small.peak_mb, wide.weights_mb - small.weights_mb
    print(f"{growth_mb:.0f} MB more for {weights_mb:.1f} MB more of weights")
    assert growth_mb <= 4 * weights_mb + BATCH_MB
