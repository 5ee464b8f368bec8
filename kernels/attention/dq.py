"""Attention, backward, for the queries: a tile of queries is held while keys go by (see `backward`).

The tile's rows of out and dout are at hand, so this kernel makes delta as well, and leaves it for the other one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import LOG2_E
from kernels.attention.schedule import FIELDS, make_schedule, programs, section_of, take
from kernels.attention.tiles import key_blocks, load_rows, sees, store_rows
from kernels.backend import chip, launch, next_power_of_2
from kernels.launches import chosen

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _fold_keys(
    dq,
    q,
    dout,
    lse,
    delta,
    k_ptr,
    v_ptr,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
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
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let blocks of keys begin..end go by, leaving out `skip` blocks from `lead` on. offset: of the first query."""
    for step in tl.range(begin, end, disable_licm=True):
        block = step
        if MASKED:
            block = tl.where(step < lead, step, step + skip)
        first = block * BLOCK_N  # fits 32 bits: a position in a document
        place = first.to(tl.int64)
        k = load_rows(k_ptr + place * k_stride, k_stride, n_k - first, BLOCK_N, COLUMNS, WIDTH, not MASKED)
        v = load_rows(v_ptr + place * v_stride, v_stride, n_k - first, BLOCK_N, COLUMNS, WIDTH, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            query, key = tl.arange(0, BLOCK_M), first + tl.arange(0, BLOCK_N)
            p = tl.where(sees(query[:, None], key[None, :], offset, window, HAS_WINDOW), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["tokens", "section"])
def _attention_bwd_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    statistics_ptr,
    dq_ptr,
    list_ptr,
    q_stride: tl.constexpr,
    q_head_stride,
    k_stride: tl.constexpr,
    k_head_stride,
    v_stride: tl.constexpr,
    v_head_stride,
    tokens,
    kv_heads,
    section,
    scale,
    window,
    GROUPS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    items = tl.load(list_ptr) * kv_heads * GROUPS  # fits 32 bits: tiles times heads
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        head, _, tile, start_q, n_q, start_k, n_k = take(list_ptr, item, kv_heads, section, GROUPS, FIELDS)
        first = tile * BLOCK_M  # fits 32 bits: a position in a document
        rows, offset = n_q - first, n_k - n_q + first
        head, start_k, place = head.to(tl.int64), start_k.to(tl.int64), start_q.to(tl.int64) + first
        k_head_ptr = k_ptr + start_k * k_stride + head // GROUPS * k_head_stride
        v_head_ptr = v_ptr + start_k * v_stride + head // GROUPS * v_head_stride
        out_place = place * OUT_STRIDE + head * WIDTH

        out = load_rows(out_ptr + out_place, OUT_STRIDE, rows, BLOCK_M, COLUMNS, WIDTH, False)
        dout = load_rows(dout_ptr + out_place, OUT_STRIDE, rows, BLOCK_M, COLUMNS, WIDTH, False)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
        query = tl.arange(0, BLOCK_M)
        lse = tl.load(lse_ptr + head * tokens + place + query, mask=query < rows, other=0.0) * _LOG2_E
        row_ptr = statistics_ptr + head * 2 * tokens + place + query
        tl.store(row_ptr, lse, mask=query < rows)
        tl.store(row_ptr + tokens, -delta, mask=query < rows)
        tile_ptr = q_ptr + place * q_stride + head * q_head_stride
        q = load_rows(tile_ptr, q_stride, rows, BLOCK_M, COLUMNS, WIDTH, False)

        dq = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        begin, whole, end_whole, end = key_blocks(first, n_q, n_k, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
        skip = end_whole - whole
        dq = _fold_keys(
            dq, q, dout, lse, delta, k_head_ptr, v_head_ptr, k_stride, v_stride, begin, whole, skip, end - skip,
            n_k, offset, scale * _LOG2_E, window, True, HAS_WINDOW, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dq = _fold_keys(
            dq, q, dout, lse, delta, k_head_ptr, v_head_ptr, k_stride, v_stride, whole, 0, 0, end_whole,
            n_k, offset, scale * _LOG2_E, window, False, HAS_WINDOW, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_rows(dq_ptr + out_place, OUT_STRIDE, rows, dq * scale, BLOCK_M, COLUMNS, WIDTH)


def candidates(arch: int, dtype: torch.dtype, width: int) -> list[dict[str, int]]:
    """What the tuner may try.

    q and dout stay in shared memory: what is left decides how many keys go by at a time. In fp32 see `forward`.
    """
    if dtype.itemsize == 4:
        small = {64: (32, 32, 4, 2), 128: (64, 32, 8, 2) if arch >= 90 else (32, 32, 8, 2), 256: (32, 32, 16, 2)}
        shapes = [small.get(width, (64, 32, 8, 2))]
    elif arch >= 90:
        shapes = [(128, 32, 8, 2), (64, 32, 8, 2)] if width == 256 else [(128, 64, 8, 2), (128, 64, 8, 3)]
        shapes += [(64, 64, 4, 3)] * (width <= 64)
    else:
        shapes = [(64, 32, 8, 2)] if width == 256 else [(64, 64, 8, 2), (64, 64, 4, 2)]
        shapes += [(128, 64, 8, 2)] * (width <= 64)
    return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), shape, strict=True)) for shape in shapes]


def dq_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(dq, statistics [H, 2, Tq] in fp32: of each query log2(e) lse, and -delta)"""
    (tokens, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    columns = max(16, next_power_of_2(width))
    blocks = chosen("attention_bwd_dq", chip(q.device), q.dtype, columns)
    tiles = make_schedule(cu_seqlens_q, cu_seqlens_k, tokens, blocks["BLOCK_M"], window, over_keys=False)
    dq, statistics = q.new_empty(q.shape), lse.new_empty((heads, 2, tokens))
    launch(
        _attention_bwd_dq_kernel,
        (programs(cu_seqlens_q.shape[0] - 1, tokens, blocks["BLOCK_M"], max_q) * heads,),
        dout,
        q,
        k,
        v,
        out,
        lse,
        statistics,
        dq,
        tiles,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        tokens,
        kv_heads,
        section_of(kv_heads, 2 * keys * width * k.element_size()),
        scale,
        window or 0,
        GROUPS=heads // kv_heads,
        HAS_WINDOW=window is not None,
        WIDTH=width,
        COLUMNS=columns,
        OUT_STRIDE=heads * width,
        FIELDS=FIELDS,
        **blocks,
    )
    return dq, statistics
