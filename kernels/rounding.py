"""fp32 to bf16, by arithmetic on bits: to the nearest even, or up and down at random.

A bf16 number is the upper half of an fp32 number. Adding half of its last place, less one bit unless the upper half
is odd, and cutting the lower half off rounds to the nearest even. Adding a random lower half instead rounds up with a
probability equal to the distance from below, so the expectation is the number itself: an update much smaller than
the last place of a bf16 weight is kept on average, where rounding to nearest would lose it every time.

The random bits are Philox-4x32-10 (Salmon et al. 2011) of (seed; place, step): the same wherever, in whatever order
and in whatever company a number is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.philox import philox, words


def stochastic_bfloat16_reference(x: Tensor, seed: int, first: int, step: Tensor) -> Tensor:
    """Round fp32 to bf16 at random.

    Args:
        x: fp32, any shape.
        seed: below 2^63.
        first: place of the first number of x; the others follow.
        step: integer scalar, below 2^32.
    Returns:
        bf16, shape of x: one of its two neighbours in bf16, itself where it is one; infinities and NaN stay.
    """
    place = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
    step = step.long()
    noise = philox((*words(place), step, torch.zeros_like(step)), words(seed))[0] >> 16
    upper = (x.contiguous().view(torch.int32) + noise.int()) >> 16
    return torch.where(x.isnan(), x.bfloat16(), upper.to(torch.int16).view(torch.bfloat16))


@triton.jit
def nearest_bfloat16(x):
    """Bits of x in bf16, as uint16. The cast would do on a GPU; the interpreter's cuts off."""
    bits = x.to(tl.uint32, bitcast=True)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, upper, 0x7FC0).to(tl.uint16)


@triton.jit
def stochastic_bfloat16(x, seed, place, step):
    """Bits of x in bf16, as uint16, rounded as `stochastic_bfloat16_reference` does; place is int64."""
    low, high = place.to(tl.uint32), (place >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    noise, _, _, _ = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero)
    upper = (x.to(tl.uint32, bitcast=True) + (noise >> 16)) >> 16
    return tl.where(x == x, upper, 0x7FC0).to(tl.uint16)
