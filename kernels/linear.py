"""The linear layer, y = x weight^T + bias, and the product it is made of.

    y = a b^T        da = dy b        db = dy^T a

In fp32 on a CPU the products go through oneDNN: the BLAS that PyTorch is built with (MKL) keeps its fastest
path for its maker's processors, and oneDNN is twice as fast on others. Elsewhere they are torch's own.

Of a 16-bit weight whose gradient is kept in fp32 (its `grad_dtype`), the last product writes `weight.grad`, or adds
itself to it, as in Megatron-LM's gradient accumulation fusion: a GPU multiplies narrow operands into a wide result and
can start from what stands there. That is 4 bytes a parameter in a step's first micro-batch and 8 in each other one, and
nothing is rounded to 16 bits on the way. Autograd would have it written in 16 bits, widened, and added: 8 and 20.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.backend import register_op, use_reference

_onednn = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times the transpose of b [N, K]; without autograd. Either may be a transposed view."""
    if _onednn is None or a.device.type != "cpu" or a.dtype != torch.float32 or 0 in (*a.shape, b.shape[0]):
        return torch.mm(a, b.t())
    # A transposed first operand is copied by one thread, element by element; the second is taken as it lies. So of
    # two transposed ones the narrower goes first: gradients of weights, whose copy may take as long as their product.
    (rows, inner), columns = a.shape, len(b)
    is_transposed = not (a.is_contiguous() or b.is_mkldnn or b.is_contiguous())
    if is_transposed and rows * inner > 2 * columns * (rows + inner):
        return _onednn(b, a, None, "none", [], "").t().contiguous()
    return _onednn(a, b, None, "none", [], "")


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, summed in fp32. out: fp32, or the dtype of a and b.

    A GPU multiplies narrow operands into wide results. A CPU would round the result first, so there the operands
    are widened.
    """
    if a.device.type == "cpu" and a.dtype != out.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    wide = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **wide)
    else:
        torch.mm(a, b, out=out, **wide)


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


def _has_wide_gradient(weight: Tensor) -> bool:
    """Whether a weight that requires a gradient is a leaf of 16 bits whose gradient is kept in fp32."""
    return weight.is_leaf and weight.grad_dtype is torch.float32 and weight.dtype.itemsize == 2


class _LinearIntoGradient(torch.autograd.Function):
    """The layer over such a weight: the gradient of the weight goes where it is kept, and autograd is given none."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        ctx.save_for_backward(x, weight)  # the weight too: on a CPU a step between the passes is found
        return linear_reference(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad
        dx = torch.mm(dy, weight) if needs_x else None
        _add_to_gradient(ctx.weight, dy, x)
        return dx, None, dy.sum(0, dtype=torch.float32) if needs_bias else None


def _add_to_gradient(weight: Tensor, dy: Tensor, x: Tensor) -> None:
    if weight.grad is None:
        gradient = torch.empty_like(weight, dtype=weight.grad_dtype)
        multiply(dy.t(), x, out=gradient)
        weight.grad = gradient
    else:
        multiply(dy.t(), x, out=weight.grad, add=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias.

    Where weight is a leaf in bf16 or fp16 whose `grad_dtype` is fp32, its gradient is added to `weight.grad` by the
    product that computes it. Autograd never sees it: `backward` leaves it there, `torch.autograd.grad` cannot return it
    and leaves it there as well, and hooks on the weight are not called.

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
    if use_reference():
        return linear_reference(x, weight, bias)
    # In a graph that torch.compile makes, autograd adds gradients up, and widens each to the dtype of the sum.
    is_recorded = weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if is_recorded and _has_wide_gradient(weight):
        return _LinearIntoGradient.apply(x, weight, bias)
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return linear_reference(x, weight, bias)
    y = _matmul_nt_op(x, weight)
    return y if bias is None else y + bias
