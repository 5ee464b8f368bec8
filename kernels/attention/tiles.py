"""What the attention kernels share: which blocks a tile meets, and how tiles of rows are read and written.

In a document of n_q queries and n_k keys, with offset = n_k - n_q and a window of w, query i sees key j when

    i + offset - w < j <= i + offset

A tile of queries meets a run of blocks of keys, and a tile of keys a run of blocks of queries. Along the run the
blocks at either end may hold pairs that do not see each other, or rows past the document; those in between do not,
and need no mask at all. For keys four block numbers bound the three parts: begin <= whole <= end_whole <= end.

Offsets are int64 from the first row of a block on; within a block they are int32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_blocks(first, n_q, n_k, window, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of BLOCK_N keys for the queries first..first+BLOCK_M of a document: begin, whole, end_whole, end."""
    lowest = first + n_k - n_q  # last key of the first query
    highest = tl.minimum(first + BLOCK_M, n_q) - 1 + n_k - n_q  # and of the last
    begin, whole = 0, 0
    end = tl.cdiv(tl.maximum(highest + 1, 0), BLOCK_N)
    end_whole = tl.maximum(lowest + 1, 0) // BLOCK_N
    if HAS_WINDOW:
        begin = tl.maximum(lowest - window + 1, 0) // BLOCK_N
        end_whole = tl.maximum(end_whole, begin)
        whole = tl.minimum(tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK_N), end_whole)
    return begin, whole, end_whole, end


@triton.jit
def query_blocks(first, n_q, n_k, window, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of BLOCK_M queries for the keys first..first+BLOCK_N of a document: begin, end."""
    lowest = first - (n_k - n_q)  # first query that sees the first key
    end = tl.cdiv(n_q, BLOCK_M)
    if HAS_WINDOW:
        end = tl.minimum(end, tl.cdiv(tl.maximum(lowest + BLOCK_N - 1 + window, 0), BLOCK_M))
    return tl.minimum(tl.maximum(lowest, 0) // BLOCK_M, end), end


@triton.jit
def sees(query, key, offset, window, HAS_WINDOW: tl.constexpr):
    """Whether queries see keys; shapes broadcast."""
    visible = key <= query + offset
    if HAS_WINDOW:
        visible = visible & (key > query + offset - window)
    return visible


@triton.jit
def _pointers(ptr, stride: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]. Row numbers are multiplied bit by bit: most bits are the same in all threads for each of a
    thread's loads, and their products with a constant stride become part of the instruction instead of registers."""
    row = tl.arange(0, ROWS)[:, None]
    pointers = ptr + row * 0 + tl.arange(0, COLUMNS)[None, :]
    for bit in tl.static_range(8):
        if 1 << bit < ROWS:
            pointers += (row & (1 << bit)) * stride
    return pointers


@triton.jit
def load_rows(
    ptr, stride: tl.constexpr, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    """[ROWS, COLUMNS] from ptr on; zeros past WIDTH columns and, unless the tile is WHOLE, past the `rows` there are.

    Zeros, not what lies there: the next document may be full of NaN, which no mask on scores would stop.
    """
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointers = _pointers(ptr, stride, ROWS, COLUMNS)
    if WHOLE and WIDTH == COLUMNS:
        return tl.load(pointers)
    if WHOLE:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    return tl.load(pointers, mask=(row < rows)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def load_paged_rows(
    ptr,
    stride: tl.constexpr,
    block_stride,
    table_ptr,
    first,
    rows,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The same of rows first, first + 1, ..., where row j lies in block table[j // PAGE] of ptr, at j % PAGE."""
    row, column = first + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < first + rows
    block = tl.load(table_ptr + row // PAGE, mask=inside, other=0).to(tl.int64)
    pointers = ptr + (block * block_stride + row % PAGE * stride)[:, None] + column[None, :]
    return tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride: tl.constexpr, rows, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Write [ROWS, COLUMNS] from ptr on, as far as there are rows and columns."""
    inside = (tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, COLUMNS) < WIDTH)[None, :]
    tl.store(_pointers(ptr, stride, ROWS, COLUMNS), values.to(ptr.dtype.element_ty), mask=inside)
