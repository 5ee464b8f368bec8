"""The public attention: checks, then the face for the device."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.cpu import attention_cpu
from kernels.attention.reference import attention_reference
from kernels.attention.sdpa import attention_sdpa
from kernels.backend import use_reference


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each document, aligned at the bottom right (see `attention_reference`).

    Args:
        q: [Tq, H, h], any float dtype; sums and softmax in fp32 (fp64 for fp64).
        k, v: [Tk, K, h], dtype of q; K divides H.
        cu_seqlens_q, cu_seqlens_k: int32 [D+1], cumulative lengths from 0 to Tq and Tk. Empty documents are
            allowed; with equal lengths (training) both are one tensor.
        max_q, max_k: upper bounds of the lengths, known to the host: launch grids are made from them.
        scale: of the scores; 1/sqrt(h) when None.
        window: a query sees its own key and the window - 1 before it; None sees all.
    Returns:
        [Tq, H, h], dtype of q. A document's rows depend on that document alone, bitwise.
    Raises:
        ValueError: shapes do not fit.
    """
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if cu_seqlens_q.shape != cu_seqlens_k.shape or cu_seqlens_q.ndim != 1 or cu_seqlens_q.shape[0] < 1:
        raise ValueError(f"cu_seqlens {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)} do not fit")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if use_reference():
        return attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, window=window)
    if q.device.type == "cuda":
        return attention_sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, scale=scale, window=window)
    return attention_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, window)[0]
