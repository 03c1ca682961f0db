"""A small parallel corpus without a download: sums in words, English and German.

German says "five and eighty", so a model has to learn to look elsewhere than straight ahead.
"""

from __future__ import annotations

import numpy as np

from holdfast.training.experiments.translation.data import Pair

# fmt: off
ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]
ENGLISH_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
GERMAN = [
    "null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
    "elf", "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn",
    "neunzehn",
]
GERMAN_TENS = [
    "zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig",
]
# fmt: on
CORPUS_SEED = 1905


def number_pairs(num_pairs: int) -> list[Pair]:
    """Distinct sums of numbers below 100, always the same ones."""
    # RandomState's streams are frozen by NumPy's compatibility policy.
    draws = np.random.RandomState(CORPUS_SEED).permutation(100 * 100)[:num_pairs]
    return [_sum(*divmod(int(draw), 100)) for draw in draws]


def english(number: int) -> str:
    """0 to 199 in English words."""
    if number >= 100:
        rest = number - 100
        return "one hundred" + (f" and {english(rest)}" if rest else "")
    if number < 20:
        return ENGLISH[number]
    tens, ones = divmod(number, 10)
    return ENGLISH_TENS[tens - 2] + (f"-{ENGLISH[ones]}" if ones else "")


def german(number: int) -> str:
    """0 to 199 in German words."""
    if number >= 100:
        rest = number - 100
        return "einhundert" + (german(rest) if rest else "")
    if number < 20:
        return GERMAN[number]
    tens, ones = divmod(number, 10)
    if not ones:
        return GERMAN_TENS[tens - 2]
    return f"{'ein' if ones == 1 else GERMAN[ones]}und{GERMAN_TENS[tens - 2]}"


def _sum(one: int, other: int) -> Pair:
    total = one + other
    return (
        f"{english(one)} plus {english(other)} is {english(total)}",
        f"{german(one)} plus {german(other)} ist {german(total)}",
    )
