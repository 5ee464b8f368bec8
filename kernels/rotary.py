"""Rotary position embedding of queries and keys, half rotation.

    (a, b) -> (a cos - b sin, b cos + a sin)                                   (Su et al. 2021, RoFormer, eq. 34)

where a and b are the first and the second half of a head, and the angle of entry i at position p is
p * inv_freq[i]. A rotation's transpose is the rotation by the opposite angle, so the backward is the same op
with the sign of the sine turned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype, register_op, use_reference


def rotary_reference(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)  # [T, 1, h/2]

    def rotate(x: Tensor) -> Tensor:
        a, b = x.to(accumulation_dtype(x.dtype)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def _rotary_fwd(
    q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, conjugate: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    sign = -1 if conjugate else 1

    def rotate(x: Tensor) -> Tensor:
        wide = accumulation_dtype(x.dtype)
        a, b = x.to(wide).chunk(2, dim=-1)
        out = torch.empty(x.shape, dtype=wide, device=x.device)
        out_a, out_b = out.chunk(2, dim=-1)
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)
        return out.to(x.dtype)

    return rotate(q), rotate(k)


def _fake_fwd(q, k, positions, cos, sin, conjugate):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:5])
    ctx.conjugate = inputs[5]
    ctx.likes = [(x.shape, {"dtype": x.dtype, "device": x.device}) for x in inputs[:2]]


def _rotary_autograd(ctx, dq, dk):
    dq, dk = (
        x if x is not None else torch.zeros(shape, **like) for x, (shape, like) in zip((dq, dk), ctx.likes, strict=True)
    )
    return *_rotary_op(dq, dk, *ctx.saved_tensors, not ctx.conjugate), None, None, None, None


_rotary_op = register_op(
    "rotary(Tensor q, Tensor k, Tensor positions, Tensor cos, Tensor sin, bool conjugate) -> (Tensor, Tensor)",
    _rotary_fwd,
    _fake_fwd,
    setup_context=_save,
    backward=_rotary_autograd,
)


def rotary(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q: [T, H, h], h even. Computed in fp32 (fp64 for fp64).
        k: [T, K, h], dtype of q.
        positions: int64 [T], rows of the tables.
        cos, sin: fp32 [P, h/2]. No gradient flows to them.
    Returns:
        (q, k) rotated: contiguous, shapes and dtypes of the arguments.
    Raises:
        ValueError: shapes do not fit.
    """
    tokens, _, width = q.shape
    if k.ndim != 3 or k.shape[0] != tokens or k.shape[2] != width or positions.shape != (tokens,):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, positions {tuple(positions.shape)} do not fit")
    if width % 2 or cos.ndim != 2 or cos.shape[1] * 2 != width or cos.shape != sin.shape:
        raise ValueError(f"tables {tuple(cos.shape)} and {tuple(sin.shape)} do not fit heads of width {width}")
    if use_reference():
        return rotary_reference(q, k, positions, cos, sin)
    return _rotary_op(q, k, positions, cos, sin, False)
