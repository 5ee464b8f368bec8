"""Attention, backward, for keys and values: a tile of keys is held while queries go by (see `backward`).

The queries are those of every head that shares the keys, one head after the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import LOG2_E
from kernels.attention.schedule import FIELDS, make_schedule, programs, section_of, take
from kernels.attention.tiles import load_rows, query_blocks, sees, store_rows
from kernels.backend import chip, launch, next_power_of_2
from kernels.launches import chosen

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _fold_queries(
    dk,
    dv,
    k,
    v,
    dout_ptr,
    q_ptr,
    statistics_ptr,
    start_q,
    first_head,
    q_stride: tl.constexpr,
    q_head_stride,
    tokens,
    begin,
    end,
    n_q,
    offset,
    scale,
    window,
    GROUPS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Let blocks of queries begin..end of GROUPS heads go by. offset: of the first key.

    Scores are [keys, queries]: so weights and their gradients come out of one product as the next one takes them.
    Two sums of the size of the tile leave few registers. So all blocks are masked, by one loop, where two would do
    without most masks; addresses are made from the start in each step; and dp starts from -delta, not from zero.
    """
    for step in tl.range(0, (end - begin) * GROUPS, disable_licm=True):
        head, block = first_head, begin + step
        if GROUPS > 1:
            head += step // (end - begin)
            block = begin + step % (end - begin)
        first = block * BLOCK_M  # fits 32 bits: a position in a document
        head, place, rows = head.to(tl.int64), (start_q + first).to(tl.int64), n_q - first
        tile_ptr = q_ptr + place * q_stride + head * q_head_stride
        q = load_rows(tile_ptr, q_stride, rows, BLOCK_M, COLUMNS, WIDTH, False)
        tile_ptr = dout_ptr + place * OUT_STRIDE + head * WIDTH
        dout = load_rows(tile_ptr, OUT_STRIDE, rows, BLOCK_M, COLUMNS, WIDTH, False)
        row = tl.arange(0, BLOCK_M)
        row_ptr = statistics_ptr + head * 2 * tokens + place + row
        lse = tl.load(row_ptr, mask=row < rows, other=0.0)
        minus_delta = tl.load(row_ptr + tokens, mask=row < rows, other=0.0)

        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        query, key = first + row, tl.arange(0, BLOCK_N)
        is_seen = sees(query[None, :], key[:, None], offset, window, HAS_WINDOW)
        p = tl.where(is_seen, tl.exp2(s * scale - lse[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.broadcast_to(minus_delta[None, :], (BLOCK_N, BLOCK_M))
        dp = tl.dot(v, tl.trans(dout), dp, input_precision="ieee")
        dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "section"])
def _attention_bwd_dkdv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    statistics_ptr,
    dk_ptr,
    dv_ptr,
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
    GRAD_STRIDE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    items = tl.load(list_ptr) * kv_heads  # fits 32 bits: tiles times heads
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), disable_licm=True):
        head, _, tile, start_q, n_q, start_k, n_k = take(list_ptr, item, kv_heads, section, 1, FIELDS)
        first = tile * BLOCK_N  # fits 32 bits: a position in a document
        rows, offset, first_head = n_k - first, n_k - n_q - first, head * GROUPS  # fits 32 bits: a head
        head, place = head.to(tl.int64), start_k.to(tl.int64) + first
        tile_ptr = k_ptr + place * k_stride + head * k_head_stride
        k = load_rows(tile_ptr, k_stride, rows, BLOCK_N, COLUMNS, WIDTH, False)
        tile_ptr = v_ptr + place * v_stride + head * v_head_stride
        v = load_rows(tile_ptr, v_stride, rows, BLOCK_N, COLUMNS, WIDTH, False)

        dk = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
        dv = tl.zeros((BLOCK_N, COLUMNS), tl.float32)
        begin, end = query_blocks(first, n_q, n_k, window, HAS_WINDOW, BLOCK_M, BLOCK_N)
        dk, dv = _fold_queries(
            dk, dv, k, v, dout_ptr, q_ptr, statistics_ptr, start_q, first_head, q_stride, q_head_stride, tokens,
            begin, end, n_q, offset, scale * _LOG2_E, window,
            GROUPS, HAS_WINDOW, WIDTH, COLUMNS, OUT_STRIDE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        place = place * GRAD_STRIDE + head * WIDTH
        store_rows(dk_ptr + place, GRAD_STRIDE, rows, dk * scale, BLOCK_N, COLUMNS, WIDTH)
        store_rows(dv_ptr + place, GRAD_STRIDE, rows, dv, BLOCK_N, COLUMNS, WIDTH)


def candidates(arch: int, dtype: torch.dtype, width: int) -> list[dict[str, int]]:
    """What the tuner may try.

    128 keys take all registers of a multiprocessor for dk and dv at a width of 128. In fp32 see `forward`.
    """
    if dtype.itemsize == 4:
        small = {64: (32, 32, 4, 2), 128: (16, 32, 8, 1) if arch >= 90 else (32, 32, 8, 1), 256: (32, 16, 8, 1)}
        shapes = [small.get(width, (64, 32, 8, 2))]
    elif width == 256:
        shapes = [(32, 64, 8, 2)]
    elif arch >= 90 or width <= 64:
        shapes = [(64, 128, 8, 2), (64, 128, 8, 3)] + [(64, 64, 4, 2)] * (width <= 64)
    else:
        shapes = [(64, 64, 8, 2), (32, 64, 4, 2)]
    return [dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), shape, strict=True)) for shape in shapes]


def dkdv_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistics: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_k: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    (tokens, heads, width), (keys, kv_heads, _) = q.shape, k.shape
    columns = max(16, next_power_of_2(width))
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
        statistics,
        dk,
        dv,
        tiles,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        tokens,
        kv_heads,
        section_of(kv_heads, 2 * tokens * width * q.element_size() * (heads // kv_heads)),
        scale,
        window or 0,
        GROUPS=heads // kv_heads,
        HAS_WINDOW=window is not None,
        WIDTH=width,
        COLUMNS=columns,
        OUT_STRIDE=heads * width,
        GRAD_STRIDE=kv_heads * width,
        FIELDS=FIELDS,
        **blocks,
    )
    return dk, dv
