"""The hard experiment, with a figure for its report."""

from __future__ import annotations

import numpy as np

from holdfast.training.reporting.figures import Confusion, Measure, count_confusions
from tests.faults.hard_experiment import Hard


class Reported(Hard):
    """Shows how many validation points it gets right."""

    def figures(self, measure: Measure) -> tuple[Confusion]:
        is_correct = measure(self.dataset("validation"))["is_correct"].astype(np.int64)
        counts = count_confusions(np.ones_like(is_correct), is_correct, 2)
        return (Confusion("Right and wrong", "64 validation points", ("wrong", "right"), counts),)
