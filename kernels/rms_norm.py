"""RMSNorm, alone and fused with the residual add.

    y = x * rsqrt(mean(x^2) + eps) * weight                                    (Zhang & Sennrich 2019, eq. 4)

With r = rsqrt(mean(x^2) + eps) and g = dy * weight, the gradients are

    dx      = r * (g - x * r^2 * mean(g * x))
    dweight = sum over rows of dy * x * r

The forward keeps r, one number a row, so the backward reads x once more instead of keeping x * r.

Traffic for T rows of N numbers of b bytes: forward 2TNb, with the add 4TNb; backward 3TNb, with the add 4TNb, and
the partial sums of dweight. These need a sum over all rows: a few programs on every multiprocessor walk over the
rows, each keeps one fp32 row of partial sums, and torch adds those up. So there are no atomics, and the result does
not depend on which program finishes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulation_dtype, chip, launch, register_op, use_reference

# The widest row: a program holds one row in registers.
MAX_COLUMNS = 16384
# Backward programs on one multiprocessor. Their loops hide each other's latency; each leaves a partial row.
PROGRAMS_PER_MULTIPROCESSOR = 4


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    rstd_ptr,
    rows,
    heads,
    x_stride,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    is_row = row < rows
    inside = is_row[:, None] & (column < COLUMNS)[None, :]
    place = (row * COLUMNS)[:, None] + column[None, :]
    x_place = (row // heads * x_stride + row % heads * COLUMNS)[:, None] + column[None, :]

    x = tl.load(x_ptr + x_place, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        narrow = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + place, narrow, mask=inside)
        x = narrow.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / COLUMNS + eps)
    tl.store(rstd_ptr + row, rstd, mask=is_row)
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, x * rstd[:, None] * weight[None, :], mask=inside)


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    heads,
    x_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DSUM: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < COLUMNS
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < rows
        inside = is_row[:, None] & is_column[None, :]
        place = (row * COLUMNS)[:, None] + column[None, :]
        x_place = (row // heads * x_stride + row % heads * COLUMNS)[:, None] + column[None, :]
        x = tl.load(x_ptr + x_place, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)
        normed = x * rstd[:, None]
        dweight += tl.sum(dy * normed, axis=0)
        g = dy * weight[None, :]
        mean = tl.sum(g * normed, axis=1) / COLUMNS
        dx = (g - normed * mean[:, None]) * rstd[:, None]
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, dx, mask=inside)
    tl.store(partial_ptr + program * COLUMNS + column, dweight, mask=is_column)


def _blocks(columns: int) -> dict[str, int]:
    """Blocks and warps for a width; of the width alone, so that a row's sum is taken in the same order anywhere."""
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of {columns} numbers: the kernel takes at most {MAX_COLUMNS}")
    block = triton.next_power_of_2(columns)
    rows = max(1, 2048 // block)  # of heads, several rows: a program should move a few kilobytes
    # 16 numbers a thread: two loads of 16 bytes in flight, and no spills before 16384 columns.
    return {"COLUMNS": columns, "BLOCK": block, "ROWS": rows, "num_warps": min(16, max(1, rows * block // 512))}


def _head_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """x, and how its rows lie: so many side by side every so many entries. Others than that are copied."""
    *_, columns = x.shape
    if not x.is_contiguous() and x.ndim == 3 and x.stride()[1:] == (columns, 1) and x.stride(0) >= 0:
        return x, x.shape[1], x.stride(0)
    return x.contiguous(), 1, columns


def _rms_norm_fwd_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _launch_fwd(x, None, weight, eps)
    return y, rstd


def _launch_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised, sum with the residual, r)"""
    columns = x.shape[-1]
    rows = x.numel() // max(1, columns)
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = y if residual is None else x.new_empty(x.shape)
    x, heads, stride = _head_rows(x) if residual is None else (x.contiguous(), 1, columns)
    residual = x if residual is None else residual.contiguous()
    blocks = _blocks(columns)
    grid = (triton.cdiv(rows, blocks["ROWS"]),)
    arguments = x, residual, weight.contiguous(), y, total, rstd, rows, heads, stride, eps
    launch(_rms_norm_fwd_kernel, grid, *arguments, HAS_RESIDUAL=total is not y, **blocks)
    return y, total, rstd


def _rms_norm_bwd_triton(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dsum: what reached the sum by another way; it is added to dx."""
    columns = x.shape[-1]
    rows = rstd.numel()
    blocks = _blocks(columns)
    tiles = triton.cdiv(rows, blocks["ROWS"])
    grid = (min(tiles, PROGRAMS_PER_MULTIPROCESSOR * chip(x.device).multiprocessors),)
    dx, partial = x.new_empty(x.shape), x.new_empty((*grid, columns), dtype=torch.float32)
    x, heads, stride = _head_rows(x)
    dy, has_dsum = dy.contiguous(), dsum is not None
    dsum = dy if dsum is None else dsum.contiguous()
    arguments = dy, dsum, x, weight.contiguous(), rstd, dx, partial, rows, heads, stride
    launch(_rms_norm_bwd_kernel, grid, *arguments, HAS_DSUM=has_dsum, **blocks)
    return dx, partial.sum(dim=0).to(weight.dtype)


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


def _add_rms_norm_bwd_triton(
    dy: Tensor, dresidual: Tensor, residual: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    return _rms_norm_bwd_triton(dy, residual, weight, rstd, dresidual)


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
    if dy is None:
        return dresidual, dresidual, None, None
    if dresidual is None:
        dx, dweight = _rms_norm_bwd_op(dy, *ctx.saved_tensors)
    else:
        dx, dweight = _add_rms_norm_bwd_op(dy, dresidual, *ctx.saved_tensors)
    return dx, dx, dweight, None


_rms_norm_op = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_fwd,
    _fake_fwd,
    triton=_rms_norm_fwd_triton,
    setup_context=_save_for_rms_norm,
    backward=_rms_norm_autograd,
)
_rms_norm_bwd_op = register_op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _rms_norm_bwd_face,
    lambda dy, x, weight, rstd: (x.new_empty(x.shape), torch.empty_like(weight)),
    triton=_rms_norm_bwd_triton,
)
_add_rms_norm_op = register_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_rms_norm_fwd,
    _fake_add_fwd,
    triton=_launch_fwd,
    setup_context=_save_for_add_rms_norm,
    backward=_add_rms_norm_autograd,
)
_add_rms_norm_bwd_op = register_op(
    "add_rms_norm_bwd(Tensor dy, Tensor dresidual, Tensor residual, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    _add_rms_norm_bwd,
    lambda dy, dresidual, residual, weight, rstd: (residual.new_empty(residual.shape), torch.empty_like(weight)),
    triton=_add_rms_norm_bwd_triton,
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
        ValueError: weight is not [N], or N is above 16384 on a GPU.
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
        ValueError: shapes differ, weight is not [N], or N is above 16384 on a GPU.
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
