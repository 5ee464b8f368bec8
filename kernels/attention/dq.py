"""Attention, backward, for the queries: a tile of queries is held while keys go by (see `backward`).

The tile's rows of out and dout are at hand, so this kernel makes delta as well, one number a query and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import LOG2_E
from kernels.attention.schedule import FIELDS, make_schedule, programs, section_of, take
from kernels.attention.tiles import key_blocks, load_rows, sees, store_rows
from kernels.backend import chip, launch
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
    first,
    begin,
    lead,
    skip,
    end,
    n_q,
    n_k,
    scale,
    window,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let blocks of keys begin..end go by, leaving out `skip` blocks from `lead` on. lse: times log2(e)."""
    for step in range(begin, end):
        block = step
        if MASKED:
            block = tl.where(step < lead, step, step + skip)
        place = block * BLOCK_N
        k = load_rows(k_ptr, k_stride, place, n_k, BLOCK_N, COLUMNS, WIDTH, not MASKED)
        v = load_rows(v_ptr, v_stride, place, n_k, BLOCK_N, COLUMNS, WIDTH, not MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(s * scale - lse[:, None])
        if MASKED:
            query, key = first + tl.arange(0, BLOCK_M), place + tl.arange(0, BLOCK_N)
            p = tl.where(sees(query[:, None], key[None, :], n_k - n_q, window, HAS_WINDOW), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_bwd_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    list_ptr,
    q_stride: tl.constexpr,
    q_head_stride,
    k_stride: tl.constexpr,
    k_head_stride,
    v_stride: tl.constexpr,
    v_head_stride,
    out_stride: tl.constexpr,
    tokens,
    kv_heads,
    section,
    scale,
    window,
    GROUPS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    heads = kv_heads * GROUPS
    count = tl.load(list_ptr)
    for item in range(tl.program_id(0), count * heads, tl.num_programs(0)):
        head, _, tile, start_q, n_q, start_k, n_k = take(list_ptr, item, count, kv_heads, section, GROUPS, FIELDS)
        first = tile * BLOCK_M
        head, start_q, start_k = head.to(tl.int64), start_q.to(tl.int64), start_k.to(tl.int64)
        k_head_ptr = k_ptr + start_k * k_stride + head // GROUPS * k_head_stride
        v_head_ptr = v_ptr + start_k * v_stride + head // GROUPS * v_head_stride
        out_place = start_q * out_stride + head * WIDTH
        row_place = head * tokens + start_q + first + tl.arange(0, BLOCK_M)
        is_query = first + tl.arange(0, BLOCK_M) < n_q

        out = load_rows(out_ptr + out_place, out_stride, first, n_q, BLOCK_M, COLUMNS, WIDTH, False)
        dout = load_rows(dout_ptr + out_place, out_stride, first, n_q, BLOCK_M, COLUMNS, WIDTH, False)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
        tl.store(delta_ptr + row_place, delta, mask=is_query)
        lse = tl.load(lse_ptr + row_place, mask=is_query, other=0.0) * _LOG2_E
        q_head_ptr = q_ptr + start_q * q_stride + head * q_head_stride
        q = load_rows(q_head_ptr, q_stride, first, n_q, BLOCK_M, COLUMNS, WIDTH, False)

        dq = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        begin, whole, end_whole, end = key_blocks(first, n_q, n_k, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
        skip = end_whole - whole
        dq = _fold_keys(
            dq, q, dout, lse, delta, k_head_ptr, v_head_ptr, k_stride, v_stride, first, begin, whole, skip,
            end - skip, n_q, n_k, scale * _LOG2_E, window, True, HAS_WINDOW, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dq = _fold_keys(
            dq, q, dout, lse, delta, k_head_ptr, v_head_ptr, k_stride, v_stride, first, whole, 0, 0,
            end_whole, n_q, n_k, scale * _LOG2_E, window, False, HAS_WINDOW, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        store_rows(dq_ptr + out_place, out_stride, first, n_q, dq * scale, BLOCK_M, COLUMNS, WIDTH)


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
    """(dq, delta [H, Tq])"""
    (tokens, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    columns = max(16, triton.next_power_of_2(width))
    blocks = chosen("attention_bwd_dq", chip(q.device), q.dtype, columns)
    tiles = make_schedule(cu_seqlens_q, cu_seqlens_k, tokens, blocks["BLOCK_M"], window, over_keys=False)
    dq, delta = q.new_empty(q.shape), torch.empty_like(lse)
    launch(
        _attention_bwd_dq_kernel,
        (programs(cu_seqlens_q.shape[0] - 1, tokens, blocks["BLOCK_M"], max_q) * heads,),
        dout,
        q,
        k,
        v,
        out,
        lse,
        delta,
        dq,
        tiles,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        heads * width,
        tokens,
        kv_heads,
        section_of(kv_heads, 2 * keys * width * k.element_size()),
        scale,
        window or 0,
        GROUPS=heads // kv_heads,
        HAS_WINDOW=window is not None,
        WIDTH=width,
        COLUMNS=columns,
        FIELDS=FIELDS,
        **blocks,
    )
    return dq, delta
