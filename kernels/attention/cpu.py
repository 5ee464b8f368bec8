"""Attention on the CPU: torch's flash kernel, once a document.

A document never shares a call with another, so its result does not depend on what it is packed with. Grouped
query heads become a batch dimension over which keys and values are expanded without a copy.
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


def _join_heads(x: Tensor) -> Tensor:
    """[H/K, K, n, h] -> [n, K, H/K, h], a view in the order of heads."""
    return x.permute(2, 1, 0, 3)


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
    out = q.new_zeros((tokens, kv_heads, groups, width))
    lse = torch.zeros((heads, tokens), dtype=accumulation_dtype(q.dtype))
    for d, rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        mask = _mask(rows, keys, window, q)
        if block_table is None:
            key, value = k[keys], v[keys]
        else:
            key, value = (_from_pages(cache, block_table[d], keys.stop - keys.start) for cache in (k, v))
        args = _split_heads(q[rows], kv_heads), _expand(key, groups), _expand(value, groups)
        doc_out, doc_lse = _flash(*args, 0.0, mask is None, attn_mask=mask, scale=scale)
        out[rows] = _join_heads(doc_out)
        _by_group(lse, groups)[..., rows] = doc_lse
    return out.view(tokens, heads, width), lse


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
    for _, rows, keys in _documents(cu_seqlens_q, cu_seqlens_k):
        mask = _mask(rows, keys, window, q)
        grads = _flash_bwd(
            _split_heads(dout[rows], kv_heads),
            _split_heads(q[rows], kv_heads),
            _expand(k[keys], groups),
            _expand(v[keys], groups),
            _split_heads(out[rows], kv_heads),
            _by_group(lse, groups)[..., rows],
            0.0,
            mask is None,
            attn_mask=mask,
            scale=scale,
        )
        dq[rows] = _join_heads(grads[0]).flatten(1, 2)
        for target, grad in zip((dk, dv), grads[1:], strict=True):
            target[keys] = (grad[0] if groups == 1 else grad.sum(dim=0)).transpose(0, 1)
    return dq, dk, dv
