"""Attention on the CPU: torch's flash kernel, once a document.

A document never shares a call with another, so its result does not depend on what it is packed with. Grouped
query heads become a batch dimension over which keys and values are expanded without a copy. The heads of all
documents are split in one view, and each takes its stretch of that: where documents are short, the host's time for
views is as much as their attention.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.attention.reference import visible_keys
from kernels.backend import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Every document that has something to compute: its number, its query rows without the leading ones that see no
    key, and its key rows."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for d in range(len(bounds_q) - 1):
        start_q, end_q, start_k, end_k = bounds_q[d], bounds_q[d + 1], bounds_k[d], bounds_k[d + 1]
        start_q = max(start_q, end_q - (end_k - start_k))
        if end_q > start_q:
            yield d, slice(start_q, end_q), slice(start_k, end_k)


def _from_pages(cache: Tensor, pages: Tensor, count: int) -> Tensor:
    """[blocks, page, K, h] -> [count, K, h]: the first rows of a document's pages. One document at a time: all of them
    side by side would hold, and write, what they share as often as it is shared."""
    return cache[pages[: -(-count // cache.shape[1])].long()].flatten(0, 1)[:count]


def _mask(rows: slice, keys: slice, window: int | None, like: Tensor) -> Tensor | None:
    """Additive [1, 1, n_q, n_k], or None where plain causal masking of a square says the same."""
    n_q, n_k = rows.stop - rows.start, keys.stop - keys.start
    if n_q == n_k and (window is None or n_k <= window):
        return None
    visible = visible_keys(n_q, n_k, window, like.device)
    mask = torch.zeros((1, 1, n_q, n_k), dtype=like.dtype, device=like.device)
    return mask.masked_fill_(~visible, float("-inf"))


def _split_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[n, H, h] -> [H/K, K, n, h], a view."""
    return x.unflatten(1, (kv_heads, -1)).permute(2, 1, 0, 3)


def _stretch(x: Tensor, part: slice) -> Tensor:
    """Of [H/K, K, T, ...] the tokens of a document, a view."""
    return x.narrow(2, part.start, part.stop - part.start)


def _expand(x: Tensor, groups: int) -> Tensor:
    """[n, K, h] -> [H/K, K, n, h], a view."""
    return x.transpose(0, 1).expand(groups, -1, -1, -1)


def _by_group(lse: Tensor, groups: int) -> Tensor:
    """[H, T] -> [H/K, K, T], a view."""
    return lse.unflatten(0, (-1, groups)).transpose(0, 1)


def attention_fwd_torch(
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
    groups = heads // kv_heads
    out = q.new_zeros((tokens, heads, width))
    lse = torch.zeros((heads, tokens), dtype=accumulation_dtype(q.dtype))
    queries, outs, lses = _split_heads(q, kv_heads), _split_heads(out, kv_heads), _by_group(lse, groups)
    if block_table is None:
        all_keys, all_values = _expand(k, groups), _expand(v, groups)
    for d, rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        mask = _mask(rows, keys, window, q)
        if block_table is None:
            key, value = _stretch(all_keys, keys), _stretch(all_values, keys)
        else:
            pages = block_table[d]
            key, value = (_expand(_from_pages(cache, pages, keys.stop - keys.start), groups) for cache in (k, v))
        args = _stretch(queries, rows), key, value
        doc_out, doc_lse = _flash(*args, 0.0, mask is None, attn_mask=mask, scale=scale)
        _stretch(outs, rows).copy_(doc_out)
        _stretch(lses, rows).copy_(doc_lse)
    return out, lse


def attention_bwd_torch(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = k.shape[1]
    groups = q.shape[1] // kv_heads
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    douts, queries, outs, dqueries = (_split_heads(x, kv_heads) for x in (dout, q, out, dq))
    all_keys, all_values, lses = _expand(k, groups), _expand(v, groups), _by_group(lse, groups)
    dkeys, dvalues = _expand(dk, 1), _expand(dv, 1)
    for _, rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        mask = _mask(rows, keys, window, q)
        dquery, *grads = _flash_bwd(
            _stretch(douts, rows),
            _stretch(queries, rows),
            _stretch(all_keys, keys),
            _stretch(all_values, keys),
            _stretch(outs, rows),
            _stretch(lses, rows),
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
        _stretch(dqueries, rows).copy_(dquery)
        for target, grad in zip((dkeys, dvalues), grads, strict=True):
            _stretch(target, keys).copy_(grad if groups == 1 else grad.sum(dim=0, keepdim=True))
    return dq, dk, dv
