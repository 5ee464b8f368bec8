"""8-bit copies of matrices: one scale for a whole tensor, taken from its largest number each time it is cast.

    copy = nearest(x * scale),   scale = 2^floor(log2(M / max|x|)),   x = copy / scale to within the rounding

M is the largest number of the format: 448 in E4M3 (4 bits of exponent, 3 of mantissa), 57344 in E5M2; ties go to the
even neighbour (Micikevicius et al. 2022, "FP8 formats for deep learning", table 1). Scales are powers of two: they
round nothing themselves, so that each number is rounded once, and cost at most one of the format's 18 or 32 binades.
Nothing overflows, for what is largest becomes M at most. Where x holds an infinity or NaN the scale is NaN, and with
it all of the copy. The host learns nothing of all this.

A product wants the rows of both operands to lie along the sum, and a tensor takes part in two products with sums over
different dimensions: the copy of a transposed tensor is made in the same pass. Its rows are as long as a multiple of
16, which products ask for, and end in zeros.

Traffic for N numbers of b bytes: bN for the largest, and bN + N for each copy, or bN + 2N for both.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import cdiv, launch, next_power_of_2

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The largest number of either is 1.75 times 2 to this.
_TOP = {E4M3: 8, E5M2: 15}
# Of max|x|, below which scales stop growing: 2^-100.
_LEAST_EXPONENT = 27
_INFINITY = 0x7F800000
# Added to the bits of an fp32 number, it carries into the exponent where the mantissa is above 1.75.
_CARRY = 0x1FFFFF
ALIGNMENT = 16
# That a program looks through for the largest.
_NUMBERS = 8192

_LEAST, _INFINITE, _CARRIES = tl.constexpr(_LEAST_EXPONENT), tl.constexpr(_INFINITY), tl.constexpr(_CARRY)
# The interpreter's casts to eight bits do not round to the nearest.
_IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def largest_reference(x: Tensor) -> Tensor:
    return x.abs().amax().float()


def scales_reference(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale, 1 / scale) of tensors whose largest numbers these are."""
    bits = largest.view(torch.int32)
    exponent = ((bits + _CARRY) >> 23).clamp(min=_LEAST_EXPONENT)
    is_finite = bits < _INFINITY
    scale = ((254 + _TOP[dtype] - exponent) << 23).view(torch.float32)
    inverse = ((exponent - _TOP[dtype]) << 23).view(torch.float32)
    return scale.where(is_finite, torch.nan), inverse.where(is_finite, torch.nan)


def fp8_round_reference(x: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What a copy of x stands for: copy / scale, in the dtype of x, bf16 or fp32, which loses nothing of it."""
    scale, inverse = scales_reference(largest, dtype)
    return ((x.float() * scale).to(dtype).float() * inverse).to(x.dtype)


@triton.jit(do_not_specialize=["rows"])
def _largest_kernel(x_ptr, largest_ptr, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of fp32 numbers without their sign are in the order of the numbers, infinity and NaN behind them all."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset, mask=offset < rows.to(tl.int64) * COLUMNS, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest_ptr, tl.max(bits, axis=0), sem="relaxed")  # of integers, so in any order the same


@triton.jit
def _nearest(x, TYPE: tl.constexpr, TOP: tl.constexpr):
    """x in eight bits."""
    if not _IS_INTERPRETED:
        return x.to(TYPE)
    MANTISSA: tl.constexpr = 3 if TOP == 8 else 2
    BIAS: tl.constexpr = 7 if TOP == 8 else 15
    SHIFT: tl.constexpr = 23 - MANTISSA
    size = tl.abs(x)
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT << SHIFT
    coarse = 2.0 ** (24 - BIAS - MANTISSA)  # the last place of what is near it is the format's smallest number
    rounded = tl.where(size < 2.0 ** (1 - BIAS), (size + coarse) - coarse, normal.to(tl.float32, bitcast=True))
    # Moved to where exponents of fp32 are those of the format, subnormal ones included.
    code = (rounded * 2.0 ** (BIAS - 127)).to(tl.int32, bitcast=True) >> SHIFT
    code = tl.where(x == x, code, 0x7F) | (x.to(tl.int32, bitcast=True) >> 24 & 0x80)
    return code.to(tl.uint8).to(TYPE, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def _cast_kernel(
    x_ptr,
    largest_ptr,
    rows_ptr,
    columns_ptr,
    inverse_ptr,
    rows,
    COLUMNS: tl.constexpr,
    TYPE: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    first = (tl.program_id(0) // BLOCKS).to(tl.int64) * ROWS
    start = (tl.program_id(0) % BLOCKS).to(tl.int64) * BLOCK

    bits = tl.load(largest_ptr)
    exponent = tl.maximum((bits + _CARRIES) >> 23, _LEAST)
    is_finite = bits < _INFINITE
    scale = tl.where(is_finite, ((254 + TOP - exponent) << 23).to(tl.float32, bitcast=True), float("nan"))
    if tl.program_id(0) == 0:
        inverse = ((exponent - TOP) << 23).to(tl.float32, bitcast=True)
        tl.store(inverse_ptr, tl.where(is_finite, inverse, float("nan")))

    row, column = first + tl.arange(0, ROWS)[:, None], start + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < COLUMNS)
    x = tl.load(x_ptr + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
    copy = _nearest(x * scale, TYPE, TOP)
    if rows_ptr is not None:
        tl.store(rows_ptr + row * COLUMNS + column, copy, mask=inside)
    if columns_ptr is not None:
        padded = (rows + 15) // 16 * 16
        row, column = first + tl.arange(0, ROWS)[None, :], start + tl.arange(0, BLOCK)[:, None]
        tl.store(columns_ptr + column * padded + row, tl.trans(copy), mask=(row < padded) & (column < COLUMNS))


@functools.cache
def _options(columns: int, is_turned: bool) -> dict[str, int]:
    """How a cast is launched."""
    # 16 numbers are a store of 16 bytes, and 8 threads fill a line of either copy. Turned, a tile goes through shared
    # memory, a byte a number; 64 numbers a thread leave two programs of 8 warps on a multiprocessor, and more.
    block = min(128, next_power_of_2(columns))
    return {"COLUMNS": columns, "BLOCK": block, "ROWS": 128 if is_turned else 32, "num_warps": 8 if is_turned else 4}


def largest(x: Tensor) -> Tensor:
    """max|x|.

    Args:
        x: [M, N], any float dtype.
    Returns:
        fp32 scalar, exact; NaN or infinity where x has one.
    """
    found = torch.zeros((), dtype=torch.int32, device=x.device)
    # 32 numbers a thread, 64 bytes in flight in 16 bits; more of them, and fewer programs meet in one number.
    grid, options = cdiv(x.numel(), _NUMBERS), {"COLUMNS": x.shape[1], "BLOCK": _NUMBERS, "num_warps": 8}
    launch(_largest_kernel, (grid,), x.contiguous(), found, x.shape[0], **options)
    return found.view(torch.float32)


def fp8_cast(
    x: Tensor, largest: Tensor, dtype: torch.dtype, *, rows: bool = False, columns: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """8-bit copies of x, by Triton kernels; what they stand for is `fp8_round_reference`.

    Args:
        x: [M, N], any float dtype.
        largest: fp32 scalar, of x.
        dtype: E4M3 or E5M2.
        rows, columns: which copies are wanted.
    Returns:
        (copy [M, N] or None, copy of the transposed [N, M to the next multiple of 16] or None, fp32 scalar 1 / scale).
    """
    height, width = x.shape
    of_rows = x.new_empty((height, width), dtype=dtype) if rows else None
    of_columns = x.new_empty((width, cdiv(height, ALIGNMENT) * ALIGNMENT), dtype=dtype) if columns else None
    inverse = x.new_empty((), dtype=torch.float32)
    options = _options(width, columns)
    grid = cdiv(height, options["ROWS"]) * cdiv(width, options["BLOCK"])
    kind = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}[dtype]
    arguments = x.contiguous(), largest.view(torch.int32), of_rows, of_columns, inverse, height
    launch(_cast_kernel, (grid,), *arguments, TYPE=kind, TOP=_TOP[dtype], **options)
    return of_rows, of_columns, inverse
