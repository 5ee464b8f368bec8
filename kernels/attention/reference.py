"""What attention computes.

Document d holds the queries cu_seqlens_q[d]:cu_seqlens_q[d+1] and the keys cu_seqlens_k[d]:cu_seqlens_k[d+1].
Its last query stands at its last key (aligned at the bottom right), so query i of n_q sees

    keys j <= i + n_k - n_q    and, with a sliding window of w,    j > i + n_k - n_q - w

    out = softmax(scale * q k^T) v                                             (Vaswani et al. 2017, eq. 1)

Query head i reads key-value head i // (H / K) (grouped queries, Ainslie et al. 2023). A query that sees no key
gives zeros.

With a block table (a paged cache, Kwon et al. 2023) keys and values are [blocks, page, K, h] and lie scattered: key
j of document d is row j % page of block table[d, j // page].
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype


def visible_keys(n_q: int, n_k: int, window: int | None, device: torch.device) -> Tensor:
    """bool [n_q, n_k]: which keys each query sees."""
    query = torch.arange(n_q, device=device).unsqueeze(1) + (n_k - n_q)
    key = torch.arange(n_k, device=device)
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def gather_pages(cache: Tensor, cu_seqlens_k: Tensor, block_table: Tensor) -> Tensor:
    """[blocks, page, K, h] -> [Tk, K, h]: the documents' keys side by side."""
    lengths, page = cu_seqlens_k.diff().tolist(), cache.shape[1]
    rows = [cache[block_table[d, : -(-n // page)].long()].flatten(0, 1)[:n] for d, n in enumerate(lengths)]
    return torch.cat([cache.flatten(0, 1)[:0], *rows])


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> Tensor:
    if block_table is not None:
        k, v = gather_pages(k, cu_seqlens_k, block_table), gather_pages(v, cu_seqlens_k, block_table)
    groups = q.shape[1] // k.shape[1]
    out = [q[:0]]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for d in range(len(bounds_q) - 1):
        query = q[bounds_q[d] : bounds_q[d + 1]].to(accumulation_dtype(q.dtype))
        key = k[bounds_k[d] : bounds_k[d + 1]].repeat_interleave(groups, dim=1).to(query.dtype)
        value = v[bounds_k[d] : bounds_k[d + 1]].repeat_interleave(groups, dim=1).to(query.dtype)
        visible = visible_keys(len(query), len(key), window, q.device)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        weights = weights.masked_fill(~visible, 0.0)  # rows without a key are NaN after the softmax
        out.append(torch.einsum("hqk,khd->qhd", weights, value).to(q.dtype))
    return torch.cat(out)
