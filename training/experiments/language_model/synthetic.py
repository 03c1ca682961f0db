"""A small text without a download: sentences of a harbour, always the same ones."""

from __future__ import annotations

import numpy as np

PEOPLE = ("the old fisherman", "the harbour master", "a young diver", "the keeper of the light")
DEEDS = ("mends", "carries", "hides", "counts", "sells", "paints")
THINGS = ("a red net", "two anchors", "the long rope", "an empty boat", "nine silver fish")
PLACES = ("on the pier", "behind the sheds", "under the bridge", "near the rocks")
TIMES = ("before the tide turns", "after the storm", "at dawn", "when the kelp holds fast")
TEXT_SEED = 1876


def generated_text(num_sentences: int) -> str:
    """Sentences, one a line."""
    # RandomState's streams are frozen by NumPy's compatibility policy.
    draws = np.random.RandomState(TEXT_SEED)
    parts = (PEOPLE, DEEDS, THINGS, PLACES, TIMES)
    columns = [draws.randint(len(part), size=num_sentences) for part in parts]
    lines = (
        " ".join(part[number] for part, number in zip(parts, row, strict=True))
        for row in zip(*columns, strict=True)
    )
    return "".join(f"{line}.\n" for line in lines)
