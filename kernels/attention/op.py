"""Our own attention as one op: torch's flash kernel on a processor, our Triton kernels on a GPU."""

from __future__ import annotations

from torch import Tensor

from kernels.attention.backward import attention_bwd_triton
from kernels.attention.cpu import attention_bwd_torch, attention_fwd_torch
from kernels.attention.forward import attention_fwd_triton
from kernels.backend import accumulation_dtype, register_op


def _fake_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window, block_table=None):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, ctx.max_q, ctx.max_k, ctx.scale, ctx.window, block_table = inputs
    out, lse = output
    ctx.is_paged = block_table is not None
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)


def _attention_autograd(ctx, dout, _):
    if ctx.is_paged:
        raise NotImplementedError("attention with a block table has no backward: it reads a cache, for generation.")
    grads = _attention_bwd_op(dout, *ctx.saved_tensors, ctx.max_q, ctx.max_k, ctx.scale, ctx.window)
    return *grads, *([None] * 7)


_attention_op = register_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k,"
    " float scale, int? window, Tensor? block_table) -> (Tensor, Tensor)",
    attention_fwd_torch,
    _fake_fwd,
    triton=attention_fwd_triton,
    setup_context=_save,
    backward=_attention_autograd,
)
_attention_bwd_op = register_op(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, float scale, int? window) -> (Tensor, Tensor, Tensor)",
    attention_bwd_torch,
    lambda dout, q, k, v, *_: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    triton=attention_bwd_triton,
)


def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with its log-sum-exp; only the former has gradients. See `attention_reference`.

    Args:
        q: [Tq, H, h], h at most 256 on a GPU; k, v: [Tk, K, h]. Heads and rows may lie apart.
        cu_seqlens_q, cu_seqlens_k: int32 [D+1]; rows of q past the last bound are left undefined.
        max_q, max_k: upper bounds of the lengths, for launch grids.
        scale: of the scores, above 0.
        window: keys that a query sees, its own included.
        block_table: int32 [D, B] of a paged cache; then k, v are [blocks, page, K, h]. Forward only.
    Returns:
        (out [Tq, H, h] of the dtype of q, log-sum-exp [H, Tq] in fp32, natural). Of queries without keys both are 0.
    Raises:
        ValueError: scale is not above 0.
        NotImplementedError: in the backward, with a block table.
    """
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0")
    return _attention_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, scale, window, block_table)
