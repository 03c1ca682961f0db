"""The order of samples: a keyed permutation that is computed position by position.

Nothing is shuffled and nothing is stored, so a resume at position 10^8 costs what a start costs.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from holdfast.training.errors import InputError

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

TABLE_SIZE = 4096
NUM_ROUNDS = 8
_HALF = np.uint64(32)


class Permutation:
    """A keyed bijection on 0..n-1, in constant memory, for 1 <= n <= 2**62.

    Up to ``TABLE_SIZE`` it is a sort by keyed hashes: a uniform draw among all n! orders. Above,
    it is a Feistel network on a rectangle a x b that just covers n (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002): a position is a pair (left, right), each round adds a
    keyed hash of one to the other, modulo its side. The few results from n to a*b-1 are sent
    through again (cycle walking); as a*b - n < sqrt(n) + 1 that happens hardly ever.
    """

    def __init__(self, n: int, key: int) -> None:
        if not 1 <= n <= 2**62:
            raise InputError(f"a permutation needs 1 to 2**62 elements, found {n}")
        self._n = n
        digest = hashlib.blake2b(f"{n}/{key}".encode(), digest_size=8 * NUM_ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self._width = _ceil_sqrt(n)
        self._height = -(-n // self._width)
        self._table = self._sorted_table() if n <= TABLE_SIZE else None

    def __len__(self) -> int:
        return self._n

    def __call__(self, positions: Int64Array) -> Int64Array:
        """The elements that stand at ``positions``, each in 0..n-1; any shape.

        Raises InputError for a position outside of 0..n-1.
        """
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size:
            smallest, largest = int(positions.min()), int(positions.max())
            if smallest < 0 or largest >= self._n:
                raise InputError(
                    f"positions must lie in 0..{self._n - 1}, found {smallest}..{largest}"
                )
        if self._table is not None:
            return self._table[positions]
        return self._walk(positions.ravel().astype(np.uint64)).reshape(positions.shape)

    def _sorted_table(self) -> Int64Array:
        hashes = _mix(np.arange(self._n, dtype=np.uint64) ^ self._keys[0], self._keys[1])
        return np.argsort(hashes, kind="stable").astype(np.int64)

    def _walk(self, values: UInt64Array) -> Int64Array:
        values = self._rounds(values)
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            values[outside] = self._rounds(values[outside])
            outside = outside[values[outside] >= self._n]
        return values.astype(np.int64)

    def _rounds(self, values: UInt64Array) -> UInt64Array:
        width, height = np.uint64(self._width), np.uint64(self._height)
        left, right = np.divmod(values, height)  # left < width, right < height
        for number in range(0, NUM_ROUNDS, 2):
            left = _add(left, right, self._keys[number], width)
            right = _add(right, left, self._keys[number + 1], height)
        result: UInt64Array = left * height + right
        return result


def _ceil_sqrt(n: int) -> int:
    root = int(np.sqrt(np.float64(n)))
    while root * root < n:
        root += 1
    while (root - 1) * (root - 1) >= n:
        root -= 1
    return root


def _add(value: UInt64Array, other: UInt64Array, key: np.uint64, side: np.uint64) -> UInt64Array:
    """``value`` plus a hash of ``other`` scaled to 0..side-1, modulo ``side`` <= 2**31."""
    total = value + (((_mix(other, key) >> _HALF) * side) >> _HALF)
    return np.where(total >= side, total - side, total)


def _mix(value: UInt64Array, key: np.uint64) -> UInt64Array:
    """The finalizer of SplitMix64, keyed before and between; wraps around on purpose."""
    mixed = value + key
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= (mixed >> np.uint64(27)) ^ key
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
