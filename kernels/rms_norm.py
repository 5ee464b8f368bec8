"""RMSNorm, alone and fused with the residual add.

    y = x * rsqrt(mean(x^2) + eps) * weight                                    (Zhang & Sennrich 2019, eq. 4)

With r = rsqrt(mean(x^2) + eps) and g = dy * weight, the gradients are

    dx      = r * (g - x * r^2 * mean(g * x))
    dweight = sum over rows of dy * x * r

The forward keeps r, one number a row, so the backward reads x once more instead of keeping x * r.

Traffic for T rows of N numbers of b bytes: forward 2TNb, with the add 4TNb; backward 3TNb, with the add 4TNb, and
the partial sums of dweight. These need a sum over all rows: one or two programs on every multiprocessor walk over the
rows, each keeps one fp32 row of partial sums, and a second kernel adds those up. So there are no atomics, and the
result does not depend on which program finishes first. While a program computes its rows, asynchronous copies bring
the next ones to shared memory.

A row of x * r, g, weight and dweight in fp32 fills the registers of a multiprocessor at 8192 columns. Of wider rows
a program owns a piece; it reads the other pieces too, from the L2 cache mostly, for the mean.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulation_dtype, cdiv, chip, launch, next_power_of_2, register_op, use_reference
from kernels.recipes import offer_recipe

# The widest row: a program of the forward holds one row in registers.
MAX_COLUMNS = 16384
# The widest row of which a program of the backward holds x * r, g, weight and dweight in registers.
WHOLE_ROW = 8192
# What a multiprocessor has for tiles: 164 and 228 KB, less what the system and the sums over rows take.
SHARED_MEMORY = {80: 160 * 1024, 90: 224 * 1024}


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = x + residual
    return rms_norm_reference(residual, weight, eps), residual


@triton.jit(do_not_specialize=["rows"])
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
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < COLUMNS)
    # Asked for before the row's mean is known, so that its way is not added to the row's.
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0)
    x = tl.load(x_ptr + (row // heads * x_stride + row % heads * COLUMNS) + column, mask=inside, other=0.0)
    x = x.to(tl.float32)
    if HAS_RESIDUAL:
        total = x + tl.load(residual_ptr + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        narrow = total.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * COLUMNS + column, narrow, mask=inside)
        x = narrow.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / COLUMNS + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    tl.store(y_ptr + row * COLUMNS + column, x * rstd * weight.to(tl.float32), mask=inside)


@triton.jit
def _load_terms(x_ptr, dy_ptr, inside, weight, rstd):
    """A tile's x * r, dy and g, in fp32."""
    normed = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32) * rstd
    dy = tl.load(dy_ptr, mask=inside, other=0.0).to(tl.float32)
    return normed, dy, dy * weight


@triton.jit
def _store_dx(dx_ptr, dsum_ptr, inside, normed, g, mean, rstd, HAS_DSUM: tl.constexpr):
    dx = (g - normed * mean) * rstd
    if HAS_DSUM:
        dx += tl.load(dsum_ptr, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr, dx, mask=inside)


@triton.jit(do_not_specialize=["rows"])
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
    TAIL: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_DSUM: tl.constexpr,
):
    """A program's columns are a block and a tail, or one piece of several; other pieces only add to the mean."""
    program = (tl.program_id(0) // PIECES).to(tl.int64)
    piece = tl.program_id(0) % PIECES
    column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    if TAIL > 0:
        tail_column = BLOCK + tl.arange(0, TAIL)[None, :]
        tail_weight = tl.load(weight_ptr + tail_column, mask=tail_column < COLUMNS, other=0.0).to(tl.float32)
        tail_dweight = tl.zeros((ROWS, TAIL), tl.float32)
    # In stages: the next rows are on their way to shared memory while these are computed.
    for start in tl.range(program * ROWS, rows, tl.num_programs(0) // PIECES * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)  # the interpreter counts loops in 32 bits
        is_row = row < rows
        x_row = x_ptr + (row // heads * x_stride + row % heads * COLUMNS)
        dy_row, dsum_row, dx_row = dy_ptr + row * COLUMNS, dsum_ptr + row * COLUMNS, dx_ptr + row * COLUMNS
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in tl.static_range(1, PIECES):
            other = (piece + step) % PIECES * BLOCK + tl.arange(0, BLOCK)[None, :]
            other_weight = tl.load(weight_ptr + other, mask=other < COLUMNS, other=0.0).to(tl.float32)
            in_other = is_row & (other < COLUMNS)
            normed, _, g = _load_terms(x_row + other, dy_row + other, in_other, other_weight, rstd)
            products += g * normed
        inside = is_row & (column < COLUMNS)
        normed, dy, g = _load_terms(x_row + column, dy_row + column, inside, weight, rstd)
        dweight += dy * normed
        total = tl.sum(products + g * normed, axis=1, keep_dims=True)
        if TAIL > 0:
            in_tail = is_row & (tail_column < COLUMNS)
            tail_normed, dy, tail_g = _load_terms(x_row + tail_column, dy_row + tail_column, in_tail, tail_weight, rstd)
            tail_dweight += dy * tail_normed
            total += tl.sum(tail_g * tail_normed, axis=1, keep_dims=True)
        mean = total / COLUMNS
        _store_dx(dx_row + column, dsum_row + column, inside, normed, g, mean, rstd, HAS_DSUM)
        if TAIL > 0:
            places = dx_row + tail_column, dsum_row + tail_column
            _store_dx(*places, in_tail, tail_normed, tail_g, mean, rstd, HAS_DSUM)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial_ptr + program * COLUMNS + column, tl.sum(dweight, axis=0), mask=column < COLUMNS)
    if TAIL > 0:
        column = BLOCK + tl.arange(0, TAIL)
        tl.store(partial_ptr + program * COLUMNS + column, tl.sum(tail_dweight, axis=0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["rows"])
def _sum_rows_kernel(x_ptr, sum_ptr, rows, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        total += tl.load(x_ptr + row * COLUMNS + column, mask=(row < rows) & (column < COLUMNS), other=0.0)
    column = first + tl.arange(0, BLOCK)
    tl.store(sum_ptr + column, tl.sum(total, axis=0), mask=column < COLUMNS)


@functools.cache
def _fwd_options(columns: int) -> dict[str, int]:
    """How the forward is launched: by the width alone, so that a row's sum is taken in the same order anywhere."""
    block = next_power_of_2(columns)
    rows = max(1, 2048 // block)  # of heads, several rows: a program should move a few kilobytes
    # 16 numbers a thread are two loads of 16 bytes; 16 warps are enough to load 16384 columns without spills.
    return {"COLUMNS": columns, "BLOCK": block, "ROWS": rows, "num_warps": min(16, max(1, rows * block // 512))}


@functools.cache
def _bwd_options(columns: int, x_bytes: int, weight_bytes: int, streams: int, arch: int) -> tuple[dict[str, int], int]:
    """How the backward is launched, and how many of its programs a multiprocessor holds at once.

    By the width, the dtypes and the chip alone, never by the number of rows.

    Args:
        x_bytes, weight_bytes: of one number.
        streams: rows that are read: x and dy, and dsum where there is one.
    """
    pieces, tail, programs = 1, 0, 1
    if columns > WHOLE_ROW:
        block = 16384 // x_bytes
        # 8 columns a thread in 16 bits: a load of 16 bytes. fp32 spills with fewer than 255 registers.
        pieces, rows, warps = cdiv(columns, block), 1, 32 if x_bytes == 2 else 8
    else:
        block = next_power_of_2(columns)
        # 4096 to 5120 columns: the tail spares a block of 8192, a third of the instructions and half the registers, so
        # that two programs fit. Masked columns of other widths, and of fp32, cost less than their memory traffic.
        if x_bytes == 2 and 4096 < columns <= 5120:
            block, tail = 4096, next_power_of_2(columns - 4096)
        rows, warps = max(1, 4096 // block), max(8, block // 512)  # 16 columns a thread
        # Two programs fill each other's waits for a row's mean. The registers hold only one of 16 warps, or of numbers
        # that are not loaded in pairs: fp32, and rows that start at any byte.
        programs = 2 if warps == 8 and x_bytes == 2 and columns % 8 == 0 else 1
    # What is on its way to one multiprocessor must cover 32 KB, that is 4.3 TB/s / 132 for a microsecond of latency.
    # Two tiles ahead are 96 KB of 4096 columns in bf16; one ahead where shared memory holds no more.
    tile = rows * (block + tail) * streams * x_bytes + (pieces - 1) * block * (2 * x_bytes + weight_bytes)
    stages = 1 + min(2, SHARED_MEMORY[90 if arch >= 90 else 80] // (programs * tile))
    options = {"COLUMNS": columns, "BLOCK": block, "TAIL": tail, "PIECES": pieces, "ROWS": rows, "STAGES": stages}
    return options | {"num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps * programs))}, programs


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
    if columns > MAX_COLUMNS:
        raise ValueError(f"rows of {columns} numbers: the kernel takes at most {MAX_COLUMNS}")
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)
    total = y if residual is None else x.new_empty(x.shape)
    x, heads, stride = _head_rows(x) if residual is None else (x.contiguous(), 1, columns)
    residual = x if residual is None else residual.contiguous()
    options = _fwd_options(columns)
    grid = (cdiv(rstd.numel(), options["ROWS"]),)
    arguments = x, residual, weight.contiguous(), y, total, rstd, rstd.numel(), heads, stride, eps
    launch(_rms_norm_fwd_kernel, grid, *arguments, HAS_RESIDUAL=total is not y, **options)
    return y, total, rstd


def _rms_norm_bwd_triton(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dsum: what reached the sum by another way; it is added to dx."""
    columns, rows, has_dsum = x.shape[-1], rstd.numel(), dsum is not None
    where = chip(x.device)
    options, resident = _bwd_options(columns, x.itemsize, weight.itemsize, 2 + has_dsum, where.arch)
    # All programs run at once, and their partial sums, of 264 programs on 132 multiprocessors, are 3% of the traffic
    # of 8192 rows.
    programs = min(cdiv(rows, options["ROWS"]), resident * where.multiprocessors // options["PIECES"])
    dx, partial = x.new_empty(x.shape), x.new_empty((programs, columns), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape)
    x, heads, stride = _head_rows(x)
    dy = dy.contiguous()
    dsum = dy if dsum is None else dsum.contiguous()
    arguments = dy, dsum, x, weight.contiguous(), rstd, dx, partial, rows, heads, stride
    launch(_rms_norm_bwd_kernel, (programs * options["PIECES"],), *arguments, HAS_DSUM=has_dsum, **options)
    # 128 bytes of 256 partial rows a program.
    blocks = {"COLUMNS": columns, "BLOCK": 32, "ROWS": 256, "num_warps": 8}
    launch(_sum_rows_kernel, (cdiv(columns, 32),), partial, dweight, programs, **blocks)
    return dx, dweight


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
    y = _rms_norm_op(x, weight, eps)[0]
    offer_recipe((y,), _rms_norm_op, x, weight, eps)
    return y


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
    y, total, _ = _add_rms_norm_op(x, residual, weight, eps)
    offer_recipe((y,), _rms_norm_op, total, weight, eps)
    return y, total


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 1 or x.ndim == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit the last dimension of x {tuple(x.shape)}")
