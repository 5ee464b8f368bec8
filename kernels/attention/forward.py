"""Attention, forward: one pass over the keys with a running softmax.

For every tile of queries of one head, blocks of keys go by (Dao et al. 2022, algorithm 1; Dao 2023, algorithm 1):

    s     = scale q k^T
    top'  = max(top, rowmax(s))                          total' = total e^(top - top') + rowsum(e^(s - top'))
    out'  = out e^(top - top') + e^(s - top') v

and in the end out / total is the result and top + log(total) the log-sum-exp, which the backward needs. Powers are of
two, with log2(e) folded into the scale. Sums and softmax are in fp32; the weights e^(s - top) are rounded to the
dtype of v for the product.

For 16-bit numbers the time is that of the two matrix products, 4 h flops for each pair of a query and a key that it
sees; traffic is q and out once, k and v once for every tile of queries, from L2 (see `schedule`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.schedule import FIELDS, make_schedule, programs, section_of, take
from kernels.attention.tiles import key_blocks, load_paged_rows, load_rows, sees, store_rows
from kernels.backend import chip, launch, next_power_of_2
from kernels.launches import chosen

LOG2_E = 1.4426950408889634
# Where running maxima start. Not -inf: a row that has seen no key yet would be -inf - (-inf).
_LOWEST = tl.constexpr(-1e38)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _fold(
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    k_block_stride,
    v_block_stride,
    table_ptr,
    begin,
    lead,
    skip,
    end,
    n_k,
    offset,
    scale,
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let blocks of keys begin..end go by, leaving out `skip` blocks from `lead` on. offset: of the first query."""
    for step in range(begin, end):
        block = step
        if MASKED:
            block = tl.where(step < lead, step, step + skip)
        first = block * BLOCK_N  # fits 32 bits: a position in a document
        rows = n_k - first
        if PAGE:
            k = load_paged_rows(k_ptr, k_stride, k_block_stride, table_ptr, first, rows, PAGE, BLOCK_N, COLUMNS, WIDTH)
        else:
            place_ptr = k_ptr + first.to(tl.int64) * k_stride
            k = load_rows(place_ptr, k_stride, rows, BLOCK_N, COLUMNS, WIDTH, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            query, key = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
            s = tl.where(sees(query[:, None], key[None, :], offset, window, HAS_WINDOW), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * scale)
        p = tl.exp2(s * scale - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None]
        if PAGE:
            v = load_paged_rows(v_ptr, v_stride, v_block_stride, table_ptr, first, rows, PAGE, BLOCK_N, COLUMNS, WIDTH)
        else:
            place_ptr = v_ptr + first.to(tl.int64) * v_stride
            v = load_rows(place_ptr, v_stride, rows, BLOCK_N, COLUMNS, WIDTH, not MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        top = new_top
    return acc, total, top


# Numbers that change from batch to batch are not specialised, or a ragged one would be compiled for.
@triton.jit(do_not_specialize=["tokens", "section", "table_stride"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    list_ptr,
    table_ptr,
    q_stride: tl.constexpr,
    q_head_stride,
    k_stride: tl.constexpr,
    k_head_stride,
    k_block_stride,
    v_stride: tl.constexpr,
    v_head_stride,
    v_block_stride,
    table_stride,
    tokens,
    kv_heads,
    section,
    scale,
    window,
    GROUPS: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # What does not change from tile to tile is made again for each: it would fill the registers of the inner loops.
    items = tl.load(list_ptr) * kv_heads * GROUPS  # fits 32 bits: tiles times heads
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        head, document, tile, start_q, n_q, start_k, n_k = take(list_ptr, item, kv_heads, section, GROUPS, FIELDS)
        first = tile * BLOCK_M  # fits 32 bits: a position in a document
        rows, offset = n_q - first, n_k - n_q + first
        head = head.to(tl.int64)
        place = start_q.to(tl.int64) + first
        k_head_ptr = k_ptr + head // GROUPS * k_head_stride
        v_head_ptr = v_ptr + head // GROUPS * v_head_stride
        table_row_ptr = table_ptr + document.to(tl.int64) * table_stride
        if PAGE == 0:
            k_head_ptr += start_k.to(tl.int64) * k_stride
            v_head_ptr += start_k.to(tl.int64) * v_stride
        tile_ptr = q_ptr + place * q_stride + head * q_head_stride
        q = load_rows(tile_ptr, q_stride, rows, BLOCK_M, COLUMNS, WIDTH, False)

        acc = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        begin, whole, end_whole, end = key_blocks(first, n_q, n_k, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
        skip = end_whole - whole
        acc, total, top = _fold(
            acc, total, top, q, k_head_ptr, v_head_ptr, k_stride, v_stride, k_block_stride, v_block_stride,
            table_row_ptr, begin, whole, skip, end - skip, n_k, offset, scale, window,
            True, HAS_WINDOW, PAGE, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        acc, total, top = _fold(
            acc, total, top, q, k_head_ptr, v_head_ptr, k_stride, v_stride, k_block_stride, v_block_stride,
            table_row_ptr, whole, 0, 0, end_whole, n_k, offset, scale, window,
            False, HAS_WINDOW, PAGE, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip

        is_blind = total == 0.0
        total = tl.where(is_blind, 1.0, total)
        lse = tl.where(is_blind, 0.0, (top + tl.log2(total)) * _LN_2)
        query = tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + head * tokens + place + query, lse, mask=query < rows)
        tile_ptr = out_ptr + place * OUT_STRIDE + head * WIDTH
        store_rows(tile_ptr, OUT_STRIDE, rows, acc / total[:, None], BLOCK_M, COLUMNS, WIDTH)


def candidates(arch: int, dtype: torch.dtype, width: int) -> list[dict[str, int]]:
    """What the tuner may try.

    For 16-bit numbers tiles of 128 queries, where they fit in registers: a block of keys is then read from L2 once
    for 128 of them, half of what L2 can bring in that time. In fp32 products are made without matrix instructions,
    and larger blocks spill.
    """
    narrow = width <= 64
    if dtype.itemsize == 4:
        small = {64: (32, 32, 4, 2), 128: (32, 32, 8, 1) if arch >= 90 else (64, 32, 8, 2), 256: (16, 32, 8, 1)}
        shapes = [small.get(width, (64, 32, 8, 2))]
    elif arch >= 90:
        wide = [(128, 64, 8, 2), (128, 32, 8, 3)]
        shapes = wide if width == 256 else [(128, 128, 8, 2), *wide[:1], (128, 64, 8, 3)]
        shapes += [(128, 64, 4, 3), (64, 128, 4, 3)] * narrow
    else:
        wide = [(64, 64, 8, 2), (64, 32, 8, 2)]
        shapes = wide if width == 256 else [(128, 32, 8, 3), (64, 64, 4, 2)]
        shapes += [(128, 64, 4, 3), (128, 64, 8, 3)] * narrow
    return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), shape, strict=True)) for shape in shapes]


def attention_fwd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (tokens, heads, width), kv_heads = q.shape, k.shape[-2]
    columns = max(16, next_power_of_2(width))
    blocks = chosen("attention_fwd", chip(q.device), q.dtype, columns)
    out, lse = q.new_empty(q.shape), q.new_empty((heads, tokens), dtype=torch.float32)
    tiles = make_schedule(cu_seqlens_q, cu_seqlens_k, tokens, blocks["BLOCK_M"], window, over_keys=False)
    documents = cu_seqlens_q.shape[0] - 1
    grid = (programs(documents, tokens, blocks["BLOCK_M"], max_q) * heads,)
    q, k, v = strided(q), strided(k), strided(v)
    page, table = 0, tiles
    if block_table is not None:
        page, table = k.shape[1], block_table.contiguous()
    launch(
        _attention_fwd_kernel,
        grid,
        q,
        k,
        v,
        out,
        lse,
        tiles,
        table,
        *q.stride()[:2],
        *k.stride()[-3:-1],
        k.stride(0),
        *v.stride()[-3:-1],
        v.stride(0),
        table.stride(0),
        tokens,
        kv_heads,
        section_of(kv_heads, 2 * k.numel() // max(1, kv_heads) * k.element_size()),
        scale * LOG2_E,
        window or 0,
        GROUPS=heads // kv_heads,
        PAGE=page,
        HAS_WINDOW=window is not None,
        WIDTH=width,
        COLUMNS=columns,
        OUT_STRIDE=heads * width,
        FIELDS=FIELDS,
        **blocks,
    )
    return out, lse


def strided(x: Tensor) -> Tensor:
    """x if the kernels can read it as it lies: heads side by side or apart, but every head's row in one piece.

    Within a block offsets are int32, so rows must not be farther apart than 2^31 / 256 entries.
    """
    return x if x.stride(-1) == 1 and x.stride(-3) < 2**23 else x.contiguous()
