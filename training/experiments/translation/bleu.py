"""BLEU by sacrebleu, from counts of each sentence that add up to those of the corpus.

A row of statistics is [length of the hypothesis, length of the reference, matching n-grams for n =
1 to 4, n-grams for n = 1 to 4]. BLEU of any subset of sentences, and so of a bootstrap's resample,
is computed from the sum of their rows, without looking at a sentence again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.bleu import BLEU

MAX_ORDER = 4
NUM_STATISTICS = 2 + 2 * MAX_ORDER

Statistics = npt.NDArray[np.int64]


def sentence_statistics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]]
) -> Statistics:
    """Rows [N, 10] of hypotheses, each against one or more references."""
    metric = BLEU(force=True)
    rows = np.zeros((len(hypotheses), NUM_STATISTICS), dtype=np.int64)
    for row, hypothesis, own in zip(rows, hypotheses, references, strict=True):
        score = metric.corpus_score([hypothesis], [[reference] for reference in own])
        row[:] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return rows


def corpus_bleu(statistics: Statistics) -> float:
    """BLEU, 0 to 100, of the sentences whose rows [N, 10] are given; 0 for none."""
    total = statistics.sum(axis=0, dtype=np.int64).tolist()
    score = BLEU.compute_bleu(
        correct=total[2 : 2 + MAX_ORDER],
        total=total[2 + MAX_ORDER :],
        sys_len=total[0],
        ref_len=total[1],
        smooth_method="exp",
    )
    return float(score.score)


def signature() -> str:
    """What sacrebleu wants to see beside every figure; references vary in number."""
    metric = BLEU(force=True)
    one_has_two_references: list[Any] = [["one", "two"], ["un", None]]
    metric.corpus_score(["one", "two"], one_has_two_references)
    return str(metric.get_signature())
