"""The vocabulary of a text: its characters, or byte pairs that are learnt from it.

Learning counts, and breaks ties by number, so the same text gives the same bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from holdfast.training.bundles.continuing import NUM_BYTES, WORDS, Vocabulary, joined

Pair = tuple[int, int]


def characters_of(text: str) -> Vocabulary:
    """All characters of a text, in the order of their code points."""
    return Vocabulary("characters", symbols="".join(sorted(set(text))))


def learnt_from(text: str, size: int) -> Vocabulary:
    """At most ``size`` symbols, at least all bytes: the most frequent pair becomes the next one.

    Sennrich et al. 2016, "Neural machine translation of rare words with subword units", on bytes.
    A pair that is there once is not merged.
    """
    words = _Words(text)
    merges: list[Pair] = []
    while len(merges) < size - NUM_BYTES and (pair := words.most_frequent()) is not None:
        words.merge(pair, NUM_BYTES + len(merges))
        merges.append(pair)
    return Vocabulary("bpe", merges=merges)


class _Words:
    """The distinct words of a text as symbols, and how often each pair of these is there."""

    def __init__(self, text: str) -> None:
        counts = Counter(WORDS.findall(text))
        self._words = [list(word.encode()) for word in counts]
        self._counts = list(counts.values())
        self._pairs: Counter[Pair] = Counter()
        self._places: dict[Pair, set[int]] = defaultdict(set)
        for number in range(len(self._words)):
            self._count(number, 1)

    def most_frequent(self) -> Pair | None:
        """Of equally frequent pairs the one with the lowest numbers; None for none twice."""
        best = max(self._pairs.items(), key=_frequency, default=None)
        return None if best is None or best[1] < 2 else best[0]

    def merge(self, pair: Pair, number: int) -> None:
        """Put a symbol in the place of each pair."""
        for place in self._places.pop(pair):
            self._count(place, -1)
            self._words[place] = joined(self._words[place], pair, number)
            self._count(place, 1)
        self._pairs.pop(pair, None)

    def _count(self, number: int, sign: int) -> None:
        word = self._words[number]
        for pair in pairwise(word):
            self._pairs[pair] += sign * self._counts[number]
            if self._pairs[pair] == 0:
                del self._pairs[pair]
            self._places[pair].add(number)


def _frequency(item: tuple[Pair, int]) -> tuple[int, int, int]:
    (one, other), count = item
    return count, -one, -other
