"""Attention, backward: the weights are computed once more, from the log-sum-exp.

With p = e^(scale q k^T - lse) and delta = rowsum(out dout) the gradients are (Dao et al. 2022, algorithm 4)

    dv = p^T dout        dp = dout v^T        ds = p (dp - delta)        dq = scale ds k        dk = scale ds^T q

One kernel holds a tile of queries and lets keys go by, for dq; its rows of out and dout are at hand, so it also
makes delta. The other holds a tile of keys and lets go by the queries of every head that shares them, for dk and dv.
Each program keeps its sums in fp32 registers and writes them once: no atomics, and a document's gradients do not
depend on which program finishes first. The price is that p and dp are computed twice: seven matrix products of
2 h flops a pair, where five are counted.
"""

from __future__ import annotations

from torch import Tensor

from kernels.attention.dkdv import dkdv_triton
from kernels.attention.dq import dq_triton
from kernels.attention.forward import strided


def attention_bwd_triton(
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
    bounds = cu_seqlens_q, cu_seqlens_k
    dout, q, k, v, out = dout.contiguous(), strided(q), strided(k), strided(v), out.contiguous()
    dq, statistics = dq_triton(dout, q, k, v, out, lse, *bounds, max_q, scale, window)
    return dq, *dkdv_triton(dout, q, k, v, statistics, *bounds, max_k, scale, window)
