"""Cross-entropy from logits, a token each.

    loss = lse - x[target] + z_loss * lse^2,   lse = log sum exp x
    dx   = g ((1 + 2 z_loss lse) softmax(x) - onehot(target))

The forward keeps the logits and lse in two parts, peak and log sum exp(x - peak): their sum has lost as many digits
as stand before its point. The backward makes the softmax again.

Traffic for logits [T, V] of b bytes: forward TVb, backward 2TVb. Rows without a target are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import accumulation_dtype, cdiv, launch, register_op, use_reference
from kernels.logits import gradient, row_options, row_statistics, rows_side_by_side, target_logit, tile_options
from kernels.vocabulary import IGNORE, log_softmax_


def cross_entropy_reference(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = logits.to(accumulation_dtype(logits.dtype))
    lse = logits.logsumexp(dim=-1)
    target_logit = logits.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return (lse - target_logit + z_loss * lse.square()) * (targets != IGNORE)


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr,
    targets_ptr,
    loss_ptr,
    peak_ptr,
    log_sum_ptr,
    z_loss,
    IGNORE: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        tl.store(peak_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
    else:
        row_ptr = x_ptr + row * STRIDE
        peak, log_sum, _ = row_statistics(row_ptr, 1.0, COLUMNS, LANES, ROUNDS, STAGES, False)
        lse = peak + log_sum
        nll = peak - target_logit(row_ptr, target, COLUMNS) + log_sum
        tl.store(loss_ptr + row, nll + z_loss * lse * lse)
        tl.store(peak_ptr + row, peak)
        tl.store(log_sum_ptr + row, log_sum)


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr,
    x_ptr,
    targets_ptr,
    peak_ptr,
    log_sum_ptr,
    dx_ptr,
    z_loss,
    IGNORE: tl.constexpr,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64) // tiles
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    is_counted = target != IGNORE
    is_column = column < COLUMNS
    x = tl.load(x_ptr + row * STRIDE + column, mask=is_column & is_counted, other=0.0).to(tl.float32)
    peak, log_sum = tl.load(peak_ptr + row), tl.load(log_sum_ptr + row)
    scale = tl.load(dloss_ptr + row)
    slope = scale * (1 + 2 * z_loss * (peak + log_sum))
    dx = gradient(x - peak - log_sum, column == target, slope, 0.0, -scale, False)
    tl.store(dx_ptr + row * COLUMNS + column, tl.where(is_counted, dx, 0.0), mask=is_column)


def _cross_entropy_fwd_triton(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    x = rows_side_by_side(logits)
    loss, peak, log_sum = (x.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    arguments = x, targets.contiguous(), loss, peak, log_sum, z_loss
    # A stride known at compile time lets rows of 8 n numbers be read in 16 bytes; at run time only those of 16 n.
    options = row_options(x.shape[1], x.dtype) | {"IGNORE": IGNORE, "STRIDE": x.stride(0)}
    launch(_cross_entropy_fwd_kernel, (len(targets),), *arguments, **options)
    return loss, peak, log_sum


def _cross_entropy_bwd_triton(
    dloss: Tensor, logits: Tensor, targets: Tensor, peak: Tensor, log_sum: Tensor, z_loss: float
) -> Tensor:
    x, dx = rows_side_by_side(logits), logits.new_empty(logits.shape)
    arguments = dloss.contiguous(), x, targets.contiguous(), peak, log_sum, dx, z_loss
    options = tile_options(x.shape[1]) | {"IGNORE": IGNORE, "COLUMNS": x.shape[1], "STRIDE": x.stride(0)}
    grid = (len(targets) * cdiv(x.shape[1], options["BLOCK"]),)
    launch(_cross_entropy_bwd_kernel, grid, *arguments, **options)
    return dx


def _cross_entropy_fwd(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.to(accumulation_dtype(logits.dtype), copy=True)
    peak, log_sum = log_softmax_(x)
    nll = -x.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return (nll + z_loss * (peak + log_sum).square()).where(targets != IGNORE, 0), peak, log_sum


def _cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, peak: Tensor, log_sum: Tensor, z_loss: float
) -> Tensor:
    row_scale = dloss * (1 + 2 * z_loss * (peak + log_sum))
    dx = torch.sub(logits, peak.unsqueeze(1)).sub_(log_sum.unsqueeze(1)).exp_().mul_(row_scale.unsqueeze(1))
    dx.scatter_add_(1, targets.clamp_min(0).unsqueeze(1), -dloss.unsqueeze(1))
    dx.masked_fill_((targets == IGNORE).unsqueeze(1), 0)
    return dx.to(logits.dtype)


def _fake_fwd(logits, targets, z_loss):
    wide = accumulation_dtype(logits.dtype)
    return tuple(logits.new_empty(targets.shape, dtype=wide) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    logits, targets, ctx.z_loss = inputs
    _, peak, log_sum = output
    ctx.mark_non_differentiable(peak, log_sum)
    ctx.save_for_backward(logits, targets, peak, log_sum)


_cross_entropy_bwd_op = register_op(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor peak, Tensor log_sum, float z_loss)"
    " -> Tensor",
    _cross_entropy_bwd,
    lambda dloss, logits, *_: logits.new_empty(logits.shape),
    triton=_cross_entropy_bwd_triton,
)
_cross_entropy_op = register_op(
    "cross_entropy(Tensor logits, Tensor targets, float z_loss) -> (Tensor, Tensor, Tensor)",
    _cross_entropy_fwd,
    _fake_fwd,
    triton=_cross_entropy_fwd_triton,
    setup_context=_save,
    backward=lambda ctx, dloss, *_: (_cross_entropy_bwd_op(dloss, *ctx.saved_tensors, ctx.z_loss), None, None),
)


def cross_entropy(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Negative log-likelihood of each target, with an optional z-loss added.

    Args:
        logits: [T, V], any float dtype; computed in fp32 (fp64 for fp64).
        targets: int64 [T]; where IGNORE (-100) the loss is 0 and has no gradient.
        z_loss: coefficient of the squared log-sum-exp.
    Returns:
        [T], fp32.
    Raises:
        ValueError: shapes do not fit.
        RuntimeError: a target is outside the vocabulary. A GPU, where nobody waits to look, gives NaN.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for logits {tuple(logits.shape)}")
    if use_reference():
        return cross_entropy_reference(logits, targets, z_loss)
    return _cross_entropy_op(logits, targets, z_loss)[0]
