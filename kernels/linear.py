"""The linear layer, y = x weight^T + bias, and the product it is made of.

    y = a b^T        da = dy b        db = dy^T a

In fp32 on a CPU the products go through oneDNN: the BLAS that PyTorch is built with (MKL) keeps its fastest
path for its maker's processors, and oneDNN is twice as fast on others. Elsewhere they are torch's own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import register_op, use_reference

_onednn = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times the transpose of b [N, K]; without autograd. Either may be a transposed view."""
    if _onednn is None or a.device.type != "cpu" or a.dtype != torch.float32 or 0 in (*a.shape, b.shape[0]):
        return torch.mm(a, b.t())
    return _onednn(a, b, None, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """A weight laid out for products with few rows: half the time with 2 to 16 rows, a tenth less with 64. No autograd.

    Args:
        weight: [N, K].
    Returns:
        An opaque tensor of that shape that `linear` and `matmul_nt` take as their second operand, and nothing else
        does; or the weight itself, where no other layout is known to be faster, or if it is packed already.
    """
    is_ours = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_mkldnn
    if use_reference() or _onednn is None or not is_ours:
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def _save(ctx, inputs, output) -> None:
    a, b = inputs
    needs_a, needs_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a if needs_b else None, b if needs_a else None)


def _matmul_nt_autograd(ctx, dy):
    a, b = ctx.saved_tensors
    needs_a, needs_b = ctx.needs_input_grad[:2]
    da = _matmul_nt_op(dy, b.t()) if needs_a else None
    return da, _matmul_nt_op(dy.t(), a.t()) if needs_b else None


_matmul_nt_op = register_op(
    "matmul_nt(Tensor a, Tensor b) -> Tensor",
    matmul_nt,
    lambda a, b: a.new_empty((a.shape[0], b.shape[0])),
    setup_context=_save,
    backward=_matmul_nt_autograd,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: [T, in], any float dtype.
        weight: [out, in], dtype of x.
        bias: [out] or None.
    Returns:
        [T, out], dtype of x.
    Raises:
        ValueError: shapes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} for weight {tuple(weight.shape)}")
    if use_reference() or x.device.type != "cpu" or x.dtype != torch.float32:
        return linear_reference(x, weight, bias)
    y = _matmul_nt_op(x, weight)
    return y if bias is None else y + bias
