"""Attention, backward, for keys and values: a tile of keys is held while queries go by (see `backward`).

The queries are those of every head that shares the keys, one head after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import LOG2_E
from kernels.attention.schedule import FIELDS, make_schedule, programs, section_of, take
from kernels.attention.tiles import load_rows, query_blocks, sees, store_rows
from kernels.backend import chip, launch
from kernels.launches import chosen

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _fold_queries(
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    q_stride: tl.constexpr,
    q_head_stride,
    out_stride: tl.constexpr,
    tokens,
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
    GROUPS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let blocks of queries begin..end of GROUPS heads go by, leaving out `skip` blocks from `lead` on.

    Scores are [keys, queries]: so weights and their gradients come out of one product as the next one takes them.
    """
    for step in range(0, (end - begin) * GROUPS):
        head = 0
        if GROUPS > 1:
            head = step // (end - begin)
        block = begin + step - head * (end - begin)
        if MASKED:
            block = tl.where(block < lead, block, block + skip)
        place = block * BLOCK_M
        row = tl.arange(0, BLOCK_M)
        head = tl.full((), head, tl.int64)
        row_place = head * tokens + place
        q = load_rows(q_ptr + head * q_head_stride, q_stride, place, n_q, BLOCK_M, COLUMNS, WIDTH, not MASKED)
        dout = load_rows(dout_ptr + head * WIDTH, out_stride, place, n_q, BLOCK_M, COLUMNS, WIDTH, not MASKED)
        if MASKED:
            lse = tl.load(lse_ptr + row_place + row, mask=place + row < n_q, other=0.0)
            delta = tl.load(delta_ptr + row_place + row, mask=place + row < n_q, other=0.0)
        else:
            lse = tl.load(lse_ptr + row_place + row)
            delta = tl.load(delta_ptr + row_place + row)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(s * scale - (lse * _LOG2_E)[None, :])
        if MASKED:
            key = first + tl.arange(0, BLOCK_N)
            p = tl.where(sees((place + row)[None, :], key[:, None], n_k - n_q, window, HAS_WINDOW), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_bwd_dkdv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    list_ptr,
    q_stride: tl.constexpr,
    q_head_stride,
    k_stride: tl.constexpr,
    k_head_stride,
    v_stride: tl.constexpr,
    v_head_stride,
    out_stride: tl.constexpr,
    dk_stride: tl.constexpr,
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
    count = tl.load(list_ptr)
    for item in range(tl.program_id(0), count * kv_heads, tl.num_programs(0)):
        head, _, tile, start_q, n_q, start_k, n_k = take(list_ptr, item, count, kv_heads, section, 1, FIELDS)
        first = tile * BLOCK_N
        head, start_q, start_k = head.to(tl.int64), start_q.to(tl.int64), start_k.to(tl.int64)
        k_head_ptr = k_ptr + start_k * k_stride + head * k_head_stride
        v_head_ptr = v_ptr + start_k * v_stride + head * v_head_stride
        k = load_rows(k_head_ptr, k_stride, first, n_k, BLOCK_N, COLUMNS, WIDTH, False)
        v = load_rows(v_head_ptr, v_stride, first, n_k, BLOCK_N, COLUMNS, WIDTH, False)
        q_head_ptr = q_ptr + start_q * q_stride + head * GROUPS * q_head_stride
        dout_head_ptr = dout_ptr + start_q * out_stride + head * GROUPS * WIDTH
        rows = head * GROUPS * tokens + start_q

        dk = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
        dv = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
        begin, whole, end_whole, end = query_blocks(first, n_q, n_k, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
        skip = end_whole - whole
        dk, dv = _fold_queries(
            dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr + rows, delta_ptr + rows,
            q_stride, q_head_stride, out_stride, tokens, first, begin, whole, skip, end - skip, n_q, n_k,
            scale * _LOG2_E, window, True, GROUPS, HAS_WINDOW, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dk, dv = _fold_queries(
            dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr + rows, delta_ptr + rows,
            q_stride, q_head_stride, out_stride, tokens, first, whole, 0, 0, end_whole, n_q, n_k,
            scale * _LOG2_E, window, False, GROUPS, HAS_WINDOW, WIDTH, COLUMNS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        place = start_k * dk_stride + head * WIDTH
        store_rows(dk_ptr + place, dk_stride, first, n_k, dk * scale, BLOCK_N, COLUMNS, WIDTH)
        store_rows(dv_ptr + place, dk_stride, first, n_k, dv, BLOCK_N, COLUMNS, WIDTH)


def dkdv_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_k: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    (tokens, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    columns = max(16, triton.next_power_of_2(width))
    blocks = chosen("attention_bwd_dkdv", chip(q.device), q.dtype, columns)
    tiles = make_schedule(cu_seqlens_q, cu_seqlens_k, keys, blocks["BLOCK_N"], window, over_keys=True)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    launch(
        _attention_bwd_dkdv_kernel,
        (programs(cu_seqlens_k.shape[0] - 1, keys, blocks["BLOCK_N"], max_k) * kv_heads,),
        dout,
        q,
        k,
        v,
        lse,
        delta,
        dk,
        dv,
        tiles,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        heads * width,
        kv_heads * width,
        tokens,
        kv_heads,
        section_of(kv_heads, 2 * tokens * width * q.element_size() * (heads // kv_heads)),
        scale,
        window or 0,
        GROUPS=heads // kv_heads,
        HAS_WINDOW=window is not None,
        WIDTH=width,
        COLUMNS=columns,
        FIELDS=FIELDS,
        **blocks,
    )
    return dk, dv
