"""Cross-entropy from logits, a token each.

    loss = lse - x[target] + z_loss * lse^2,   lse = log sum exp x
    dx   = g ((1 + 2 z_loss lse) softmax(x) - onehot(target))

The forward keeps the logits and lse; the backward makes the softmax again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype, register_op, use_reference
from kernels.vocabulary import IGNORE, log_softmax_


def cross_entropy_reference(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    logits = logits.to(accumulation_dtype(logits.dtype))
    lse = logits.logsumexp(dim=-1)
    target_logit = logits.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return (lse - target_logit + z_loss * lse.square()) * (targets != IGNORE)


def _cross_entropy_fwd(logits: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    x = logits.to(accumulation_dtype(logits.dtype), copy=True)
    lse = log_softmax_(x)
    nll = -x.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1)
    return (nll + z_loss * lse.square()).where(targets != IGNORE, 0), lse


def _cross_entropy_bwd(dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, z_loss: float) -> Tensor:
    scale = dloss.where(targets != IGNORE, 0)
    row_scale = scale * (1 + 2 * z_loss * lse)
    dx = torch.sub(logits, lse.unsqueeze(1)).exp_().mul_(row_scale.unsqueeze(1))
    dx.scatter_add_(1, targets.clamp_min(0).unsqueeze(1), -scale.unsqueeze(1))
    return dx.to(logits.dtype)


def _fake_fwd(logits, targets, z_loss):
    wide = accumulation_dtype(logits.dtype)
    return logits.new_empty(targets.shape, dtype=wide), logits.new_empty(targets.shape, dtype=wide)


def _save(ctx, inputs, output) -> None:
    logits, targets, ctx.z_loss = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


_cross_entropy_bwd_op = register_op(
    "cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, float z_loss) -> Tensor",
    _cross_entropy_bwd,
    lambda dloss, logits, targets, lse, z_loss: logits.new_empty(logits.shape),
)
_cross_entropy_op = register_op(
    "cross_entropy(Tensor logits, Tensor targets, float z_loss) -> (Tensor, Tensor)",
    _cross_entropy_fwd,
    _fake_fwd,
    setup_context=_save,
    backward=lambda ctx, dloss, _: (_cross_entropy_bwd_op(dloss, *ctx.saved_tensors, ctx.z_loss), None, None),
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
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for logits {tuple(logits.shape)}")
    if use_reference():
        return cross_entropy_reference(logits, targets, z_loss)
    return _cross_entropy_op(logits, targets, z_loss)[0]
