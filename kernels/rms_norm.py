"""RMSNorm, alone and fused with the residual add.

    y = x * rsqrt(mean(x^2) + eps) * weight                                    (Zhang & Sennrich 2019, eq. 4)

With r = rsqrt(mean(x^2) + eps) and g = dy * weight, the gradients are

    dx      = r * (g - x * r^2 * mean(g * x))
    dweight = sum over rows of dy * x * r

The forward keeps r, one number a row, so the backward reads x once more instead of keeping x * r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype, register_op, use_reference


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


def _rms_norm_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(x, rstd).mul_(weight)
    return y.to(x.dtype), rstd.squeeze(-1)


def _rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    columns = x.shape[-1]
    wide = accumulation_dtype(x.dtype)
    dy, rstd = dy.to(wide), rstd.unsqueeze(-1)
    normed = torch.mul(x, rstd)
    products = torch.mul(normed, dy)
    dweight = products.reshape(-1, columns).sum(dim=0)
    mean = products.mul_(weight).mean(dim=-1, keepdim=True)
    dx = torch.mul(dy, weight).addcmul_(normed, mean, value=-1).mul_(rstd)
    return dx, dweight


def _rms_norm_bwd_face(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = _rms_norm_bwd(dy, x, weight, rstd)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _add_rms_norm_fwd(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    residual = x + residual
    y, rstd = _rms_norm_fwd(residual, weight, eps)
    return y, residual, rstd


def _add_rms_norm_bwd(
    dy: Tensor, dresidual: Tensor, residual: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dweight = _rms_norm_bwd(dy, residual, weight, rstd)
    return dx.add_(dresidual).to(residual.dtype), dweight.to(weight.dtype)


def _fake_fwd(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape), rstd


def _fake_add_fwd(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _fake_fwd(x, weight, eps)
    return y, x.new_empty(x.shape), rstd


def _save_for_rms_norm(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_autograd(ctx, dy, _):
    return *_rms_norm_bwd_op(dy, *ctx.saved_tensors), None


def _save_for_add_rms_norm(ctx, inputs, output) -> None:
    _, residual, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(residual, inputs[2], rstd)


def _add_rms_norm_autograd(ctx, dy, dresidual, _):
    dx, dweight = _add_rms_norm_bwd_op(dy, dresidual, *ctx.saved_tensors)
    return dx, dx, dweight, None


_rms_norm_op = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_fwd,
    _fake_fwd,
    setup_context=_save_for_rms_norm,
    backward=_rms_norm_autograd,
)
_rms_norm_bwd_op = register_op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _rms_norm_bwd_face,
    lambda dy, x, weight, rstd: (x.new_empty(x.shape), torch.empty_like(weight)),
)
_add_rms_norm_op = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_fwd,
    _fake_add_fwd,
    setup_context=_save_for_add_rms_norm,
    backward=_add_rms_norm_autograd,
)
_add_rms_norm_bwd_op = register_op(
    "add_rms_norm_bwd(Tensor dy, Tensor dresidual, Tensor residual, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _add_rms_norm_bwd,
    lambda dy, dresidual, residual, weight, rstd: (residual.new_empty(residual.shape), torch.empty_like(weight)),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension.

    Args:
        x: [..., N], any float dtype; statistics are taken in fp32 (fp64 for fp64).
        weight: [N], any float dtype.
        eps: added to the mean square.
    Returns:
        [..., N], dtype of x.
    Raises:
        ValueError: weight is not [N].
    """
    _check(x, weight)
    if use_reference():
        return rms_norm_reference(x, weight, eps)
    return _rms_norm_op(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream, and normalise the sum.

    Args:
        x, residual: [..., N], one dtype.
        weight: [N].
        eps: added to the mean square.
    Returns:
        (rms_norm(x + residual), x + residual), both [..., N]. The sum is rounded to the dtype of x before it
        is normalised, so that the two results agree.
    Raises:
        ValueError: shapes differ, or weight is not [N].
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}")
    if use_reference():
        return add_rms_norm_reference(x, residual, weight, eps)
    return _add_rms_norm_op(x, residual, weight, eps)[:2]


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit the last dimension of x {tuple(x.shape)}")
