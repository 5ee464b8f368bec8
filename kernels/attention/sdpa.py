"""Attention by torch's scaled_dot_product_attention, once a document: any device, autograd by torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.reference import visible_keys


# The lengths decide the control flow, so a compiled block leaves its graph here.
@torch.compiler.disable
def attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """As `attention_reference`. The host waits for the lengths, once a call."""
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
