"""The linear layer with products of 8-bit numbers, y = Q(x) Q(weight)^T + bias, and its gradients.

    y = Q4(x) Q4(W)^T      dx = Q5(dy) Q4(W)      dW = Q5(dy)^T Q4(x)

Q4 and Q5 round to E4M3 and E5M2 with one scale a tensor (`kernels.fp8_cast`); Q passes gradients on as if it were not
there. Weights and activations need places more than range, gradients range more than places (Micikevicius et al. 2022,
section 3). Results are rounded to the dtype of x. Hopper's tensor core adds 8-bit products up with some 14 bits
(DeepSeek-AI 2024, section 3.3.2): the forward, whose result the next product rounds anyway, leaves whole sums to it;
the backward adds up in fp32 what it gives for some of the terms at a time.

On a GPU the products are cuBLAS's, by `torch._scaled_mm`. It wants the rows of both operands along the sum, so the
backward reads x and W transposed, and dy both ways. On a CPU the products are those of rounded operands.

Kept for the backward are x and W as they came, and their largest numbers: what a block keeps is what it keeps without
8 bits, FSDP may free and gather W as ever, and attention's result, which attention keeps too, is there once. An 8-bit
x instead would save d + F bytes a token and layer, and cost 3d + F under selective recomputation, which computes x
again or finds it kept by attention.

Unlike the products of `kernels.linear`, `torch._scaled_mm` cannot add itself to what is there. So dW is rounded to the
dtype of x, and where the gradient of W is kept in fp32, autograd widens it and adds it.

Traffic in 16 bits, for numbers of x, W and dy: 8, 8 and 6 bytes each, of which 5, 5 and 0 in the forward. That of W is
paid for every micro-batch. By arithmetic, not by measurement, on an H200 with copies at 4.3 TB/s and products at 790
TFLOP/s in 16 bits and twice that in 8: a layer with d 4096 and F 11008 and 8192 tokens takes 12.6 ms of products in 16
bits, and in 8 bits 6.3 ms, 0.84 ms for casts of x and dy, and 0.38 ms for those of W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import chip, register_op, use_reference
from kernels.fp8_cast import (
    ALIGNMENT,
    E4M3,
    E5M2,
    fp8_cast,
    fp8_round_reference,
    largest,
    largest_reference,
)
from kernels.linear import linear_reference, matmul_nt


def has_fp8(device: torch.device) -> bool:
    """Whether a device can multiply 8-bit numbers: GPUs from Ada and Hopper on; a CPU stands in for one."""
    return device.type != "cuda" or chip(device).arch >= 89


class _Rounded(torch.autograd.Function):
    """Q4, which passes gradients on."""

    @staticmethod
    def forward(ctx, x):
        return fp8_round_reference(x, largest_reference(x), E4M3)

    @staticmethod
    def backward(ctx, dy):
        return dy


class _RoundedGradient(torch.autograd.Function):
    """Nothing, and Q5 of its gradient."""

    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return fp8_round_reference(dy, largest_reference(dy), E5M2)


def fp8_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _RoundedGradient.apply(linear_reference(_Rounded.apply(x), _Rounded.apply(weight)))
    return y if bias is None else y + bias


def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(y, max|x|, max|weight|)"""
    of_x, of_weight = largest_reference(x), largest_reference(weight)
    y = matmul_nt(fp8_round_reference(x, of_x, E4M3), fp8_round_reference(weight, of_weight, E4M3))
    return y if bias is None else y.add_(bias), of_x, of_weight


def _bwd(dy: Tensor, x: Tensor | None, weight: Tensor | None, of_x: Tensor, of_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dweight). x, weight: where the gradient that is made of them is wanted."""
    dx = dweight = dy.new_empty(0)
    dy = fp8_round_reference(dy, largest_reference(dy), E5M2)
    if weight is not None:
        dx = matmul_nt(dy, fp8_round_reference(weight, of_weight, E4M3).t())
    if x is not None:
        dweight = matmul_nt(dy.t(), fp8_round_reference(x, of_x, E4M3).t())
    return dx, dweight


def _fwd_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight = largest(x), largest(weight)
    x8, _, x_unit = fp8_cast(x, of_x, E4M3, rows=True)
    weight8, _, weight_unit = fp8_cast(weight, of_weight, E4M3, rows=True)
    y = _product(x8, weight8, x_unit, weight_unit, x.dtype, is_fast=True)
    return y if bias is None else y.add_(bias), of_x, of_weight  # as in the reference: rounded, then added


def _bwd_triton(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, of_x: Tensor, of_weight: Tensor
) -> tuple[Tensor, Tensor]:
    dx = dweight = dy.new_empty(0)
    dy = dy.contiguous()
    rows, columns, dy_unit = fp8_cast(dy, largest(dy), E5M2, rows=weight is not None, columns=x is not None)
    if weight is not None:
        _, weight8, unit = fp8_cast(weight, of_weight, E4M3, columns=True)
        dx = _product(rows, weight8, dy_unit, unit, dy.dtype)
        del rows, weight8
    if x is not None:
        _, x8, unit = fp8_cast(x, of_x, E4M3, columns=True)
        dweight = _product(columns, x8, dy_unit, unit, dy.dtype)
    return dx, dweight


def _product(
    a: Tensor | None, b: Tensor | None, a_unit: Tensor, b_unit: Tensor, dtype: torch.dtype, is_fast: bool = False
) -> Tensor:
    """a [M, K] times the transpose of b [N, K]. units: what 1 stands for in each."""
    assert a is not None and b is not None
    return torch._scaled_mm(a, b.t(), a_unit, b_unit, out_dtype=dtype, use_fast_accum=is_fast)


def _save(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    _, of_x, of_weight = output
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.mark_non_differentiable(of_x, of_weight)
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, of_x, of_weight)


def _autograd(ctx, dy, *_):
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx, dweight = _fp8_linear_bwd_op(dy, *ctx.saved_tensors)
    return dx if needs_x else None, dweight if needs_weight else None, dy.sum(0) if needs_bias else None


_fp8_linear_op = register_op(
    "fp8_linear(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _fwd,
    lambda x, weight, _: (
        x.new_empty((len(x), len(weight))),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    ),
    triton=_fwd_triton,
    setup_context=_save,
    backward=_autograd,
)
_fp8_linear_bwd_op = register_op(
    "fp8_linear_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor of_x, Tensor of_weight) -> (Tensor, Tensor)",
    _bwd,
    lambda dy, x, weight, *_: (
        dy.new_empty(0 if weight is None else (len(dy), weight.shape[1])),
        dy.new_empty(0 if x is None else (dy.shape[1], x.shape[1])),
    ),
    triton=_bwd_triton,
)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, from copies of x and weight in 8 bits.

    Args:
        x: [T, in], bf16 or fp32; any number of tokens.
        weight: [out, in], dtype of x; in and out are multiples of 16.
        bias: [out] or None, dtype of x.
    Returns:
        [T, out], dtype of x; all NaN where x or weight has an infinity or NaN.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
        raise ValueError(f"weight {tuple(weight.shape)}: 8-bit products need multiples of {ALIGNMENT}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} for weight {tuple(weight.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float32) or weight.dtype != x.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; they must both be bf16 or both fp32")
    if not len(x):
        return linear_reference(x, weight, bias)
    if use_reference():
        return fp8_linear_reference(x, weight, bias)
    return _fp8_linear_op(x, weight, bias)[0]
