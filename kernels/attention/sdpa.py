"""The provider `sdpa`: attention by torch alone, for whatever has no kernel of ours.

On a GPU, in 16 bits, torch's own flash kernel takes all documents in one call and reads their bounds itself
(`torch.nn.attention.varlen`, torch 2.11 and later). It aligns the mask at the bottom right and gives zeros to queries
that see no key, as we do; its backward is deterministic under `torch.use_deterministic_algorithms`. Anything else,
other dtypes and paged caches above all, goes through scaled_dot_product_attention once a document: any device, but
the host waits for the bounds, and a compiled block breaks there.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.reference import gather_pages, visible_keys

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

_PARAMETERS = inspect.signature(varlen_attn).parameters if varlen_attn is not None else {}
# Before the parameter came, fewer key-value heads were taken without a word.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {}


def takes_packed_documents(q: Tensor) -> bool:
    """Whether torch's flash kernel can run: on a GPU of 8.0 or later, in 16 bits, heads of at most 256."""
    is_supported = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return q.is_cuda and is_supported and "window_size" in _PARAMETERS


def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> Tensor:
    """As `attention_reference`. max_q, max_k: upper bounds of the lengths."""
    if block_table is None and q.numel() > 0 and k.numel() > 0 and takes_packed_documents(q):
        bounds = cu_seqlens_q, cu_seqlens_k, max_q, max_k
        left = -1 if window is None else window - 1
        return varlen_attn(q, k, v, *bounds, scale=scale, window_size=(left, 0), **_GROUPED)
    return _attention_by_document(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window, block_table)


# The lengths decide the control flow.
@torch.compiler.disable(reason="attention once a document reads its bounds on the host; in 16 bits it need not")
def _attention_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None,
    block_table: Tensor | None,
) -> Tensor:
    if block_table is not None:
        k, v = gather_pages(k, cu_seqlens_k, block_table), gather_pages(v, cu_seqlens_k, block_table)
    pieces = [q[:0]]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for d in range(len(bounds_q) - 1):
        if bounds_q[d] == bounds_q[d + 1]:
            continue
        query, key, value = (
            x[bounds[d] : bounds[d + 1]].transpose(0, 1).unsqueeze(0)
            for x, bounds in ((q, bounds_q), (k, bounds_k), (v, bounds_k))
        )
        n_q, n_k = query.shape[2], key.shape[2]
        blind = max(n_q - n_k, 0)  # leading queries that see no key: not every backend makes them zero
        query = query[:, :, blind:]
        is_square = n_q - blind == n_k and (window is None or n_k <= window)
        mask = None if is_square else visible_keys(n_q - blind, n_k, window, q.device)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_square, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        pieces += [q.new_zeros((blind, *q.shape[1:])), out[0].transpose(0, 1)]
    return torch.cat(pieces)
