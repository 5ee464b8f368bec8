"""Decoding: attention of one new query a row against the row's cache of keys and values.

    out_b = softmax(scale * q_b K_b^T) V_b        K_b, V_b: the first lengths[b] entries of the cache of row b

which is `attention` over documents with one query each (Vaswani et al. 2017, eq. 1; grouped queries, Ainslie et al.
2023). There is next to nothing to compute: keys and values are read once, 4 K h bytes a token in 16 bits, and used
for H / K query heads. So the work is laid out for reading.

Splits (flash-decoding, Dao et al. 2023). A program takes one row, one key-value head and one stretch of the context,
and leaves an output and a log-sum-exp in fp32; a second kernel adds the stretches up in their order, so the result
does not depend on which program finishes first. All stretches have one length, which the host knows from shapes
alone: ragged rows become more or fewer equal programs, and a program beyond the end of its row exits at once. The
stretches of a row depend on the number of rows, as rows are parallel work too: decoding is not batch invariant.

The group as a tile. The query heads of a group are the rows of a product, filled up to 16, the least that a matrix
instruction takes. That is `mma` on Hopper too: `wgmma` takes 64 rows, four times the arithmetic for the same bytes,
and 16 rows already need only 16 operations a byte. A group of more than 16 heads is several tiles, which share what
they read through the L2 cache.

Traffic: 2 K h b bytes for every key in sight (b bytes a number), and for the stretches 8 H h / length bytes a key,
that is 4 H / (K b length) of the former: 1.6% for groups of 4 in 16 bits at 512 keys. To keep an H200 busy about
4.3 TB/s x 1 µs = 33 KB have to be in flight on every multiprocessor; the pipeline of one program holds that much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.reference import attention_reference
from kernels.backend import cdiv, chip, launch, next_power_of_2, register_op, use_reference
from kernels.launches import chosen

MAX_WIDTH = 256
# Rows of a product: the least of a matrix instruction.
TILE = 16
# Keys a program reads: enough to outweigh its start and its share of the workspace; no more than lets programs that
# finish early pick up what is left. Powers of two, so multiples of every block and few different kernels.
SHORTEST, LONGEST = 128, 1024
# Stretches of a row: the second kernel holds them all at once.
MAX_SPLITS = 64
# Programs to aim for. About two run at a time, so the last ones, running alone, take a tenth of the time or less.
PROGRAMS_PER_MULTIPROCESSOR = 16


def decode_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> Tensor:
    if block_table is not None:
        k_cache, v_cache = (cache[block_table.clamp_min(0)].flatten(1, 2) for cache in (k_cache, v_cache))
    cached = torch.arange(k_cache.shape[1], device=q.device) < lengths.unsqueeze(1)
    cu_seqlens_q = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    cu_seqlens_k = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return attention_reference(q, k_cache[cached], v_cache[cached], **bounds, scale=scale, window=window)


@triton.jit
def _first_key(length, window, BLOCK: tl.constexpr):
    """Where the first stretch begins: the block of the first key in sight."""
    first = length * 0
    if window is not None:
        first = tl.maximum(length - window, 0) // BLOCK * BLOCK
    return first


@triton.jit
def _pages(table_ptr, begin, end, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Pages of a block of keys: one where it lies in one page, else one for every key."""
    page = 0
    if PAGE is not None:
        if PAGE % BLOCK == 0:
            page = tl.load(table_ptr + begin // PAGE, mask=begin < end, other=0)
        else:
            key = begin + tl.arange(0, BLOCK)
            page = tl.load(table_ptr + key // PAGE, mask=key < end, other=0)
    return page


# Numbers that change as rows come and go: known to be 1 or multiples of 16 they would ask for kernels of their own.
@triton.jit(do_not_specialize=["rows", "splits", "table_stride"])
def _decode_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    rows,
    splits,
    split_length,
    scale,
    window,
    q_stride,
    page_stride,
    key_stride,
    head_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Tiles and heads side by side read neighbouring memory; later stretches, which fewer rows have, come last.
    TILES: tl.constexpr = (GROUP + TILE - 1) // TILE
    program = tl.program_id(0)
    kv_head = (program // TILES % KV_HEADS).to(tl.int64)
    row = (program // (TILES * KV_HEADS) % rows).to(tl.int64)
    split = (program // (TILES * KV_HEADS) // rows).to(tl.int64)

    length = tl.load(lengths_ptr + row)
    start = _first_key(length, window, BLOCK) + split * split_length
    end = tl.minimum(start + split_length, length)
    if (start >= length) & (not IS_WHOLE):
        return

    member = program % TILES * TILE + tl.arange(0, TILE)
    column = tl.arange(0, WIDTH_BLOCK)
    is_column = column < WIDTH
    is_member = member < GROUP
    head = kv_head * GROUP + member
    q_place = (row * q_stride + head * WIDTH)[:, None] + column[None, :]
    q = tl.load(q_ptr + q_place, mask=is_member[:, None] & is_column[None, :], other=0.0)

    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    largest = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    out = tl.zeros((TILE, WIDTH_BLOCK), tl.float32)
    if PAGE is not None:
        table_ptr += row * table_stride
    page = _pages(table_ptr, start, end, PAGE, BLOCK)
    for begin in range(start, end, BLOCK):
        key = begin + tl.arange(0, BLOCK)
        is_key = key < end
        if window is not None:
            is_key &= key >= length - window
        if PAGE is None:
            place = row * page_stride + key * key_stride
        else:
            place = page.to(tl.int64) * page_stride + key % PAGE * key_stride
            page = _pages(table_ptr, begin + BLOCK, end, PAGE, BLOCK)
        place = place[:, None] + column[None, :]
        inside = is_key[:, None] & is_column[None, :]

        k = tl.load(k_ptr + place, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        before, largest = largest, tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - largest[:, None])
        shrink = tl.exp2(before - largest)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")

    head += row * (KV_HEADS * GROUP)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if not IS_WHOLE:
        head = head * splits + split
        tl.store(lse_ptr + head, largest + tl.log2(total), mask=is_member)
    tl.store(out_ptr + (head * WIDTH)[:, None] + column[None, :], out, mask=is_member[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["splits"])
def _decode_attention_sum_kernel(
    partial_ptr,
    lse_ptr,
    lengths_ptr,
    out_ptr,
    splits,
    split_length,
    window,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + program // HEADS)
    split = tl.arange(0, SPLITS)
    is_split = _first_key(length, window, BLOCK) + split * split_length < length
    column = tl.arange(0, WIDTH_BLOCK)
    is_column = column < WIDTH

    place = program * splits + split
    lse = tl.load(lse_ptr + place, mask=is_split, other=-1e38)
    partial_place = (place * WIDTH)[:, None] + column[None, :]
    partial = tl.load(partial_ptr + partial_place, mask=is_split[:, None] & is_column[None, :], other=0.0)
    weight = tl.where(is_split, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
    total = tl.sum(weight, axis=0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + program * WIDTH + column, out, mask=is_column)


def candidates(arch: int, dtype: torch.dtype, width: int) -> list[dict[str, int]]:
    """Blocks, warps and stages of the first kernel, for the tuner.

    Args:
        width: head width, a power of two.
    """
    key = 2 * width * dtype.itemsize  # bytes of one key and its value
    fits = 108 * 1024 if arch >= 90 else 80 * 1024  # for two programs on a multiprocessor
    # fp32 is multiplied without matrix instructions, and blocks of it have to fit the registers.
    widest = {2: 4096, 4: 1024}[dtype.itemsize]
    return [
        {"BLOCK": block, "num_warps": warps, "num_stages": stages}
        for block in ((32, 64, 128) if dtype.itemsize == 2 else (32, 64))
        for warps in (4, 8)
        for stages in (2, 3, 4)
        if 12 * 1024 <= block * key * (stages - 1) <= fits and block * width <= widest * (warps if warps == 8 else 2)
    ]


@functools.cache
def _split_length(capacity: int, programs: int, multiprocessors: int) -> int:
    """Keys of a stretch, a power of two.

    Args:
        capacity: most keys a row can see.
        programs: programs there are for every stretch.
    """
    wanted = cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, max(1, programs))
    share = next_power_of_2(capacity // wanted + 1) // 2
    fewest = next_power_of_2(cdiv(capacity, MAX_SPLITS))
    return max(fewest, min(max(share, SHORTEST), LONGEST))


def _decode_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    rows, heads, width = q.shape
    if width > MAX_WIDTH:
        raise ValueError(f"heads of width {width}: the kernel takes at most {MAX_WIDTH}")
    if q.stride()[1:] != (width, 1):
        q = q.contiguous()
    if k_cache.stride() != v_cache.stride() or k_cache.stride(3) != 1:
        k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    page, kv_heads = k_cache.shape[1:3]
    capacity = page
    if block_table is not None:
        block_table = block_table.contiguous()
        capacity *= block_table.shape[1]
    width_block = max(16, next_power_of_2(width))
    here = chip(q.device)
    blocks = chosen("decode_attention", here, q.dtype, width_block)
    if window is not None:
        capacity = min(capacity, window + blocks["BLOCK"])

    programs = rows * kv_heads * -(-(heads // kv_heads) // TILE)
    split_length = _split_length(capacity, programs, here.multiprocessors)
    splits = max(1, -(-capacity // split_length))
    out = q.new_empty(q.shape)
    if splits == 1:
        partial = lse = out
    else:
        partial = q.new_empty((rows, heads, splits, width), dtype=torch.float32)
        lse = q.new_empty((rows, heads, splits), dtype=torch.float32)
    launch(
        _decode_attention_fwd_kernel,
        (programs * splits,),
        *(q, k_cache, v_cache, lengths, block_table, partial, lse),
        *(rows, splits, split_length, scale * math.log2(math.e), window),
        *(q.stride(0), *k_cache.stride()[:3], 0 if block_table is None else block_table.stride(0)),
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        WIDTH=width,
        PAGE=None if block_table is None else page,
        IS_WHOLE=splits == 1,
        TILE=TILE,
        WIDTH_BLOCK=width_block,
        **blocks,
    )
    if splits > 1:
        size = next_power_of_2(splits)
        launch(
            _decode_attention_sum_kernel,
            (rows * heads,),
            *(partial, lse, lengths, out, splits, split_length, window),
            HEADS=heads,
            WIDTH=width,
            SPLITS=size,
            WIDTH_BLOCK=width_block,
            BLOCK=blocks["BLOCK"],
            num_warps=min(8, max(1, size * width_block // 1024)),  # 32 numbers a thread, all loads in flight
        )
    return out


def _cached(cache: Tensor, row: int, keys: slice, block_table: Tensor | None) -> Tensor:
    """Some keys of a row, [n, K, h]."""
    if block_table is None:
        return cache[row, keys]
    page = cache.shape[1]
    first = keys.start // page
    pages = block_table[row, first : cdiv(keys.stop, page)]
    return cache[pages].flatten(0, 1)[keys.start - first * page : keys.stop - first * page]


def _rows(lengths: Tensor, window: int | None) -> Iterator[tuple[int, slice]]:
    """Every row that sees a key, and the keys it sees."""
    for row, length in enumerate(lengths.tolist()):
        if length > 0:
            yield row, slice(0 if window is None else max(0, length - window), length)


def _decode_attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Once a row, the heads of a group as queries of one product, so that keys and values are read once."""
    out = q.new_zeros(q.shape)
    for row, keys in _rows(lengths, window):
        query = q[row].unflatten(0, (k_cache.shape[2], -1))  # [K, H/K, h]
        k, v = (_cached(cache, row, keys, block_table).transpose(0, 1) for cache in (k_cache, v_cache))  # [K, n, h]
        attended = F.scaled_dot_product_attention(query[None], k[None], v[None], scale=scale)
        out[row] = attended[0].flatten(0, 1)
    return out


_decode_attention_op = register_op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, float scale,"
    " int? window) -> Tensor",
    _decode_attention_torch,
    lambda q, *_: q.new_empty(q.shape),
    triton=_decode_attention_triton,
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention of one query a row, the last of its document, to the row's cached keys; without gradients.

    Nothing is read back to the host on a GPU, so the call can be part of a CUDA graph; lengths may then change
    between replays.

    Args:
        q: [B, H, h], h at most 256 on a GPU.
        k_cache, v_cache: [B, S, K, h], or [blocks, page, K, h] with a block table; dtype of q; K divides H. What
            lies beyond a row's length is not read.
        lengths: int32 [B], keys in the cache, the query's own included; at most S, or the pages of a table's row.
        scale: of the scores; 1/sqrt(h) when None.
        window: a query sees its own key and the window - 1 before it; None sees all.
        block_table: int32 [B, pages], where in the cache each page of a row lies; entries beyond a row's length
            may be anything.
    Returns:
        [B, H, h], dtype of q; zeros for rows of length 0.
    Raises:
        ValueError: shapes or dtypes do not fit, or q wants a gradient.
    """
    _check(q, k_cache, v_cache, lengths, window, block_table)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if use_reference():
        return decode_attention_reference(
            q, k_cache, v_cache, lengths, scale=scale, window=window, block_table=block_table
        )
    return _decode_attention_op(q, k_cache, v_cache, lengths, block_table, scale, window)


def _check(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None, block_table: Tensor | None
) -> None:
    is_shaped = q.ndim == 3 and k_cache.ndim == 4 and k_cache.shape == v_cache.shape and q.shape[2] == k_cache.shape[3]
    if not is_shaped or q.shape[1] % k_cache.shape[2] or (block_table is None and len(q) != len(k_cache)):
        shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
        raise ValueError(f"{shapes} do not fit")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q is {q.dtype}, the caches are {k_cache.dtype} and {v_cache.dtype}")
    if lengths.shape != q.shape[:1] or lengths.dtype != torch.int32:
        raise ValueError(f"lengths is {tuple(lengths.shape)} {lengths.dtype}; it must be int32 [{len(q)}]")
    if block_table is not None and (block_table.shape[:-1] != q.shape[:1] or block_table.dtype != torch.int32):
        raise ValueError(
            f"block_table is {tuple(block_table.shape)} {block_table.dtype}; it must be int32 [{len(q)}, pages]"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    if q.requires_grad and torch.is_grad_enabled():
        raise ValueError("decode_attention has no gradient; call it under torch.no_grad(), or use attention")
