"""Records of a validation by several ranks are those of one process."""

from __future__ import annotations

import numpy as np
import pytest

from holdfast.training.experiment.protocol import Records, concatenate
from holdfast.training.ranks.evaluation import in_order


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 7, 8, 9, 20])
def test_batches_that_were_dealt_out_are_put_together_in_order(
    num_ranks: int, num_samples: int
) -> None:
    batch_size = 4
    whole = {"loss": np.arange(num_samples) / 3, "class": np.arange(num_samples * 2).reshape(-1, 2)}
    batches = [
        {name: rows[first : first + batch_size] for name, rows in whole.items()}
        for first in range(0, num_samples, batch_size)
    ]
    parts: list[Records] = []
    for rank in range(num_ranks):
        own = batches[rank::num_ranks]
        parts.append(concatenate(own) if own else {})
    found = in_order(parts, num_samples, batch_size)
    assert found.keys() == whole.keys()
    for name, rows in whole.items():
        assert np.array_equal(found[name], rows)
