"""Permutations of range(n) that are computed, not stored: any position of any epoch costs the same.

A Feistel network (Luby & Rackoff 1988) with keyed rounds is a bijection on [0, 4^b); where it leaves range(n) it is
applied again until it is back (cycle walking, Black & Rogaway 2002). With 4^b < 16 n that takes few rounds.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64 (Steele et al. 2014)


class Permutation:
    """A bijection of range(n), drawn by a key.

    Args:
        n: at least 1.
        key: any strings and integers; equal keys give equal permutations, on every machine.
    """

    def __init__(self, n: int, *key: str | int) -> None:
        assert n >= 1
        self._n = n
        self._half_bits = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        material = blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(material, "<u8")

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """What stands at each of these positions.

        Args:
            positions: integers in range(n), any shape.
        Returns:
            int64, the same shape.
        """
        values = self._encrypt(np.asarray(positions).astype(np.uint64))
        outside = np.flatnonzero(values >= self._n)
        while len(outside):
            values.flat[outside] = self._encrypt(values.flat[outside])
            outside = outside[values.flat[outside] >= self._n]
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_scramble(right, key) & self._half_mask)
        return left << self._half_bits | right


def _scramble(values: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = values + key  # wraps modulo 2^64, as it should
    mixed = (mixed ^ mixed >> np.uint64(30)) * _MIX[0]
    mixed = (mixed ^ mixed >> np.uint64(27)) * _MIX[1]
    return mixed ^ mixed >> np.uint64(31)
