"""Random numbers as a function of a counter and a key: Philox 4x32-10                (Salmon et al. 2011)

`tl.philox` is the same function in Triton. A draw depends on its counter and key alone, not on how many were drawn
before, by whom, or in which order.
"""

from __future__ import annotations

from torch import Tensor

WORD = 0xFFFFFFFF


def words(x: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The lower and the upper 32 bits of a 64-bit number."""
    return x & WORD, x >> 32 & WORD


def philox(counter: tuple[Tensor, ...], key: tuple[int | Tensor, int | Tensor]) -> tuple[Tensor, ...]:
    """Four random words for a counter of four words and a key of two.

    Args:
        counter: 32-bit words in int64 tensors, of shapes that broadcast.
        key: likewise, or numbers.
    Returns:
        32-bit words in int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two words may wrap around in int64; its 64 bits are right all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & WORD, p1 & WORD
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & WORD, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3
