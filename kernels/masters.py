"""An fp32 number as a bf16 number and what rounding took from it: masters without a second copy of the weights.

A bf16 number is the upper half of an fp32 number. So the weight that products read, rounded to the nearest, and a
remainder of 16 bits hold an fp32 master exactly, in the 4 bytes of the master alone; a bf16 copy beside it would take
2 more, and a pass over the weights to write it.

    bits(master) = 2^16 bits(weight) + remainder        -2^15 <= remainder < 2^15

Halves are rounded away from zero, where the nearest even number would need one remainder more than 16 bits have: one
number in 2^17 differs from the usual rounding. Any NaN becomes the one with the bits 0x7fc00000.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NAN = 0x7FC00000


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        master: fp32, any shape.
    Returns:
        weight: bf16, the master rounded to the nearest, halves away from zero.
        remainder: int16. Both contiguous, in the master's shape.
    """
    master = master.contiguous()
    bits = torch.where(master.isnan(), _NAN, master.view(torch.int32))
    return ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master that `split_master` made these of, to the bit; contiguous.

    Args:
        weight: bf16, any shape.
        remainder: int16, the same shape.
    """
    upper = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    return upper.add_(remainder).view(torch.float32)


@triton.jit
def join_halves(weight, remainder):
    """The fp32 master of int16 bits of a bf16 weight and an int16 remainder, as `join_master` has it."""
    return ((weight.to(tl.int32) << 16) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split_halves(master):
    """int16 bits of the bf16 weight, and the int16 remainder, as `split_master` has them."""
    bits = tl.where(master == master, master.to(tl.int32, bitcast=True), 0x7FC00000)
    return ((bits + 0x8000) >> 16).to(tl.int16), bits.to(tl.int16)
