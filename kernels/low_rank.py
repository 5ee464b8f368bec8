"""A frozen linear layer and, beside it, adapters: one for each of the parts that are stacked in the weight.

    y_i = x W_i^T + bias_i + s u_i B_i^T,   u_i = x A_i^T                  (Hu et al. 2021, section 4.1)

    du_i = s dy_i B_i      dB_i = s dy_i^T u_i
    dA_i = du_i^T x        dx   = dy W + sum_i du_i A_i

W gets no gradient, and none is computed. Kept for the backward: x, and u [T, n r] of all n adapters, one product.

The low-rank products are bound by memory, so what counts is how often [T, in] and [T, out] cross it. The two large
products stay cuBLAS's, and the term is not added to their results afterwards: it is written first, bias and all, and
the large product adds itself to what it finds. One kernel reads dy once for both du and dB. So the term moves
3 T in + 2 T out numbers a step: x for u, dy, x for dA, and both terms written. The reads of the terms fall into
products that do not wait for memory. du and dB leave partial sums in fp32: at rank 16 a quarter of dy or less, at 32
half of it; above, two plain products read dy twice.

By arithmetic, not by measurement, in 16 bits, at T 8192 and rank 16, with products at 700 TFLOP/s and copies at
2.85 TB/s, as on an H100: the matrices of a layer take 9.5 ms forward and back with d 4096 and F 11008, and the terms
0.93 ms, 9.8%; with d 5120 and F 13696 they are 7.9%. Merging W + s B A first would move no less, and in bf16 rounds
away what is small beside W. One kernel for [x, s u] [W, B]^T would write no term, which saves 4%, and lose more than
that wherever it falls behind cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import register_op, use_reference, use_triton
from kernels.linear import linear, linear_reference, matmul_nt
from kernels.low_rank_term import MAX_RANK, adapters, term, term_gradients


def low_rank_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    sizes: Sequence[int],
    present: Sequence[bool],
    dropped: Tensor | None,
) -> Tensor:
    y = linear_reference(x, weight, bias)
    products = torch.zeros_like(y)
    for columns, rows, ranks in adapters(sizes, present, b.shape[1]):
        u = (x if dropped is None else dropped) @ a[ranks].t()
        products[:, columns] = scale * (u @ b[rows].t())
    return y + products


def _gradients(
    dy: Tensor, u: Tensor, b: Tensor, scale: float, sizes: list[int], present: list[bool]
) -> tuple[Tensor, Tensor]:
    """(du, dB), by plain products."""
    du, db = torch.empty_like(u), torch.empty_like(b)
    for columns, rows, ranks in adapters(sizes, present, b.shape[1]):
        du[:, ranks] = matmul_nt(dy[:, columns], b[rows].t())
        db[rows] = torch.mm(u[:, ranks].t(), dy[:, columns]).t()  # the other way round a CPU takes five times as long
    return du.mul_(scale), db.mul_(scale)


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    sizes: list[int],
    present: list[bool],
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y, u)"""
    u = matmul_nt(x if dropped is None else dropped, a)
    if use_triton(x):
        return term(u, bias, b, scale, sizes, present).addmm_(x, weight.t()), u
    y = matmul_nt(x, weight)
    if bias is not None:
        y.add_(bias)
    for columns, rows, ranks in adapters(sizes, present, b.shape[1]):
        y[:, columns].addmm_(u[:, ranks], b[rows].t(), alpha=scale)
    return y, u


def _bwd(
    dy: Tensor,
    read: Tensor,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    scale: float,
    sizes: list[int],
    present: list[bool],
    has_dread: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of what the adapters read, da, db). weight: where that is what the weight reads, too."""
    has_kernels = use_triton(dy)
    gradients = term_gradients if has_kernels and b.shape[1] <= MAX_RANK else _gradients
    du, db = gradients(dy, u, b, scale, sizes, present)
    da = matmul_nt(du.t(), read.t())
    if not has_dread:
        return du.new_empty(0), da, db
    if weight is None:
        return matmul_nt(du, a.t()), da, db
    if has_kernels:
        return torch.mm(du, a).addmm_(dy, weight), da, db
    return matmul_nt(dy, weight.t()).addmm_(du, a), da, db


def _save(ctx, inputs, output) -> None:
    x, weight, _, a, b, ctx.scale, ctx.sizes, ctx.present, dropped = inputs
    _, u = output
    ctx.is_dropped = dropped is not None
    ctx.mark_non_differentiable(u)
    ctx.save_for_backward(x if dropped is None else dropped, weight, a, b, u)


def _autograd(ctx, dy, _):
    read, weight, a, b, u = ctx.saved_tensors
    needs_x, needs_dropped = ctx.needs_input_grad[0], ctx.needs_input_grad[8]
    rest = a, b, u, ctx.scale, ctx.sizes, ctx.present
    if not ctx.is_dropped:
        dx, da, db = _low_rank_linear_bwd_op(dy, read, weight, *rest, needs_x)
        return dx if needs_x else None, None, None, da, db, None, None, None, None
    dx = linear(dy, weight.t()) if needs_x else None
    ddropped, da, db = _low_rank_linear_bwd_op(dy, read, None, *rest, needs_dropped)
    return dx, None, None, da, db, None, None, None, ddropped if needs_dropped else None


_low_rank_linear_op = register_op(
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, int[] sizes,"
    " bool[] present, Tensor? dropped) -> (Tensor, Tensor)",
    _fwd,
    lambda x, weight, bias, a, *_: (x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(a))),
    setup_context=_save,
    backward=_autograd,
)
_low_rank_linear_bwd_op = register_op(
    "low_rank_linear_bwd(Tensor dy, Tensor read, Tensor? weight, Tensor a, Tensor b, Tensor u, float scale,"
    " int[] sizes, bool[] present, bool has_dread) -> (Tensor, Tensor, Tensor)",
    _bwd,
    lambda dy, read, weight, a, b, u, scale, sizes, present, has_dread: (
        read.new_empty(read.shape if has_dread else (0,)),
        a.new_empty(a.shape),
        b.new_empty(b.shape),
    ),
)


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    sizes: Sequence[int],
    present: Sequence[bool] | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias, plus the product of each part's adapter.

    Args:
        x: [T, in], any float dtype, the one of all others too.
        weight: [out, in], frozen.
        bias: [out] or None, frozen.
        a: [n r, in], the A of the n parts that have an adapter, stacked.
        b: [rows of those parts, r], their B, stacked.
        scale: s, of the products.
        sizes: rows of each part; their sum is out.
        present: which parts have an adapter; by default all.
        dropped: [T, in], what the adapters read instead of x.
    Returns:
        [T, out], dtype of x; differentiable in x, a, b and dropped.
    Raises:
        ValueError: shapes or dtypes do not fit, or weight or bias wants a gradient.
    """
    present = (True,) * len(sizes) if present is None else tuple(present)
    _check(x, weight, bias, a, b, tuple(sizes), present, dropped)
    if use_reference():
        return low_rank_linear_reference(x, weight, bias, a, b, scale, sizes, present, dropped)
    return _low_rank_linear_op(x, weight, bias, a, b, scale, list(sizes), list(present), dropped)[0]


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    sizes: tuple[int, ...],
    present: tuple[bool, ...],
    dropped: Tensor | None,
) -> None:
    given = [tensor for tensor in (weight, bias, a, b, dropped) if tensor is not None]
    if any(tensor.dtype != x.dtype for tensor in given):
        raise ValueError(f"x is {x.dtype}, the others are {', '.join(str(tensor.dtype) for tensor in given)}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the weight and the bias beside an adapter are frozen; they cannot require a gradient")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} for weight {tuple(weight.shape)}")
    if dropped is not None and dropped.shape != x.shape:
        raise ValueError(f"dropped {tuple(dropped.shape)} for x {tuple(x.shape)}")
    if len(present) != len(sizes) or sum(sizes) != weight.shape[0]:
        raise ValueError(f"parts {sizes}, present {present}, for weight {tuple(weight.shape)}")
    rows = sum(size for size, is_present in zip(sizes, present, strict=True) if is_present)
    expected = sum(present) * b.shape[-1], x.shape[1]
    if b.ndim != 2 or b.shape[0] != rows or a.shape != expected:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} for parts {sizes}, present {present}")
