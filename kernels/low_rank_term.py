"""The Triton kernels of the low-rank term: written in one launch, and both gradients of it from one read of dy.

    y_i  = bias_i + s u_i B_i^T         for each part i of the columns, u [T, n r]
    du_i = s dy_i B_i,   dB_i = s dy_i^T u_i

Every program has one part's block of columns. Traffic for T rows of b bytes: T out b forward, and as much backward
with the partial sums: du's over the blocks of a part, 4 r bytes a row and block, and dB's over runs of rows, 4 r bytes
a column and run, all written and read once. They are added in a fixed order, so there are no atomics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import cdiv, chip, launch, next_power_of_2

# Of `term_gradients`: at 32 the partial sums are half of dy, and at 64 they would move as much as a second read of it.
MAX_RANK = 32
# Ranks that a program multiplies at a time.
MAX_LANES = 64


def adapters(sizes: Sequence[int], present: Sequence[bool], rank: int) -> Iterator[tuple[slice, slice, slice]]:
    """Of each adapter: its columns of y, its rows of b, its rows of a."""
    column = row = first = 0
    for size, is_present in zip(sizes, present, strict=True):
        if is_present:
            yield slice(column, column + size), slice(row, row + size), slice(first, first + rank)
            row, first = row + size, first + rank
        column += size


@triton.jit
def _find(block, SIZES: tl.constexpr, PRESENT: tl.constexpr, BLOCK: tl.constexpr, WITH_ABSENT: tl.constexpr):
    """Where a block of columns lies: (columns, which of them exist, rows of b, number of its adapter or -1)."""
    first, end, shift, adapter = 0, 0, 0, -1
    column, row, number = 0, 0, 0
    for part in tl.static_range(len(SIZES)):
        if PRESENT[part] or WITH_ABSENT:
            blocks = (SIZES[part] + BLOCK - 1) // BLOCK
            if (block >= 0) & (block < blocks):
                first, end = column + block * BLOCK, column + SIZES[part]
                shift, adapter = row - column, number if PRESENT[part] else -1
            block -= blocks
        column += SIZES[part]
        if PRESENT[part]:
            row += SIZES[part]
            number += 1
    columns = first + tl.arange(0, BLOCK)
    return columns, columns < end, columns + shift, adapter


@triton.jit(do_not_specialize=["tokens"])
def _low_rank_fwd_kernel(
    u_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    scale,
    SIZES: tl.constexpr,
    PRESENT: tl.constexpr,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of the bias and the term; zeros where there is neither."""
    column, is_column, b_row, adapter = _find(tl.program_id(0) % BLOCKS, SIZES, PRESENT, BLOCK_N, True)
    row = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = row[:, None] < tokens
    u_ptr += row[:, None] * RANKS + adapter * RANK
    b_ptr += b_row.to(tl.int64)[:, None] * RANK
    y = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in tl.range(0, RANK, LANES):
        lane = first + tl.arange(0, LANES)[None, :]
        is_lane = (lane < RANK) & (adapter >= 0)
        u = tl.load(u_ptr + lane, mask=is_row & is_lane, other=0.0)
        b = tl.load(b_ptr + lane, mask=is_column[:, None] & is_lane, other=0.0)
        y = tl.dot(u, tl.trans(b), y, input_precision="ieee")
    y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * OUT + column[None, :], y, mask=is_row & is_column[None, :])


@triton.jit(do_not_specialize=["tokens", "length"])
def _low_rank_bwd_kernel(
    dy_ptr,
    u_ptr,
    b_ptr,
    du_ptr,
    db_ptr,
    tokens,
    length,
    SIZES: tl.constexpr,
    PRESENT: tl.constexpr,
    OUT: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Over a run of `length` rows and a block of columns: what they add to each row's du, and to their rows of dB."""
    block, run = tl.program_id(0) % BLOCKS, (tl.program_id(0) // BLOCKS).to(tl.int64)
    column, is_column, b_row, adapter = _find(block, SIZES, PRESENT, BLOCK_N, False)
    lane = tl.arange(0, LANES)[None, :]
    is_lane = lane < RANK
    b_place, is_b = b_row.to(tl.int64)[:, None] * RANK + lane, is_column[:, None] & is_lane
    b = tl.load(b_ptr + b_place, mask=is_b, other=0.0)
    # `wgmma` needs 64 rows, so a result of BLOCK_N rows. `mma` takes dy as it lies from the same asynchronous copy only
    # if it stands on the right both times, so there the result is FLAT.
    db = tl.zeros((LANES, BLOCK_N) if FLAT else (BLOCK_N, LANES), tl.float32)
    du_ptr += block.to(tl.int64) * tokens * RANK
    end = tl.minimum((run + 1) * length, tokens)
    for start in tl.range(run * length, end, BLOCK_T, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_T)[:, None]
        is_row = row < end
        dy = tl.load(dy_ptr + row * OUT + column[None, :], mask=is_row & is_column[None, :], other=0.0)
        u = tl.load(u_ptr + row * RANKS + adapter * RANK + lane, mask=is_row & is_lane, other=0.0)
        du = tl.dot(dy, b, input_precision="ieee")
        tl.store(du_ptr + row * RANK + lane, du, mask=is_row & is_lane)
        if FLAT:
            db = tl.dot(tl.trans(u), dy, db, input_precision="ieee")
        else:
            db = tl.dot(tl.trans(dy), u, db, input_precision="ieee")
    db_ptr += run * ROWS * RANK
    if FLAT:
        tl.store(db_ptr + tl.trans(b_place), db, mask=tl.trans(is_b))
    else:
        tl.store(db_ptr + b_place, db, mask=is_b)


def _lanes(rank: int) -> int:
    """Ranks at a time: as products count them, at least 16."""
    return min(MAX_LANES, max(16, next_power_of_2(rank)))


def _fwd_options(dtype: torch.dtype) -> dict[str, int]:
    # 64 numbers a thread: in 16 bits, eight stores of 16 bytes. fp32 products run on no tensor core and take their
    # operands into registers.
    block = 128 if dtype.itemsize == 2 else 64
    return {"BLOCK_T": block, "BLOCK_N": block, "num_warps": 8}


def _bwd_options(rank: int, dtype: torch.dtype, arch: int) -> dict[str, Any]:
    """A wide block leaves few partial sums of du, and its own sums of dB must fit registers.

    A tile of 16-bit numbers is 64 KB up to rank 16 and 32 KB above, and one is on its way while another is worked on:
    at 4.3 TB/s and a microsecond of latency, a multiprocessor needs 33 KB in flight.
    """
    if dtype.itemsize == 4:
        return {"BLOCK_T": 32, "BLOCK_N": 64, "STAGES": 2, "FLAT": False, "num_warps": 8}
    block = 512 if rank <= 16 else 256
    is_flat = arch < 90 and rank > 1  # of rank 1 the assembler makes spills
    return {"BLOCK_T": 64, "BLOCK_N": block, "STAGES": 3, "FLAT": is_flat, "num_warps": 8}


def _constants(
    b: Tensor, sizes: Sequence[int], present: Sequence[bool], block: int, with_absent: bool
) -> dict[str, Any]:
    """What both kernels know of the parts."""
    rank = b.shape[1]
    counted = [size for size, is_present in zip(sizes, present, strict=True) if is_present or with_absent]
    return {
        "SIZES": tuple(sizes),
        "PRESENT": tuple(present),
        "OUT": sum(sizes),
        "RANKS": sum(present) * rank,
        "RANK": rank,
        "LANES": _lanes(rank),
        "BLOCKS": sum(cdiv(size, block) for size in counted),
    }


def term(u: Tensor, bias: Tensor | None, b: Tensor, scale: float, sizes: list[int], present: list[bool]) -> Tensor:
    """bias_i + s u_i B_i^T, [T, out], in one launch."""
    options = _fwd_options(u.dtype)
    constants = _constants(b, sizes, present, options["BLOCK_N"], True)
    y = u.new_empty(len(u), constants["OUT"])
    grid = (cdiv(len(u), options["BLOCK_T"]) * constants["BLOCKS"],)
    launch(_low_rank_fwd_kernel, grid, u, b.contiguous(), bias, y, len(u), scale, **constants, **options)
    return y


def term_gradients(
    dy: Tensor, u: Tensor, b: Tensor, scale: float, sizes: list[int], present: list[bool]
) -> tuple[Tensor, Tensor]:
    """(du, dB) of ranks up to MAX_RANK, with one read of dy."""
    tokens, (rows, rank) = len(u), b.shape
    where = chip(u.device)
    options = _bwd_options(rank, dy.dtype, where.arch)
    constants = _constants(b, sizes, present, options["BLOCK_N"], False)
    blocks, tile = constants["BLOCKS"], options["BLOCK_T"]
    # All programs run at once: one block each, and as many runs of rows as then fit.
    runs = max(1, where.multiprocessors // blocks)
    length = max(1, cdiv(cdiv(tokens, tile), runs)) * tile
    runs = max(1, cdiv(tokens, length))
    du_parts = torch.empty(blocks, tokens, rank, dtype=torch.float32, device=u.device)
    db_parts = torch.empty(runs, rows, rank, dtype=torch.float32, device=u.device)
    arguments = dy.contiguous(), u, b.contiguous(), du_parts, db_parts, tokens, length
    launch(_low_rank_bwd_kernel, (blocks * runs,), *arguments, ROWS=rows, **constants, **options)
    du, first = torch.empty_like(u), 0
    for columns, _, at in adapters(sizes, present, rank):
        count = cdiv(columns.stop - columns.start, options["BLOCK_N"])
        torch.mul(du_parts[first : first + count].sum(dim=0), scale, out=du[:, at])
        first += count
    return du, db_parts.sum(dim=0).mul_(scale).to(b.dtype)
