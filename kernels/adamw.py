"""AdamW over lists of tensors, in place.                                      (Loshchilov & Hutter 2019, alg. 2)

    g <- clip_scale * g
    p <- p - lr * weight_decay * p
    m <- beta1 * m + (1 - beta1) * g
    v <- beta2 * v + (1 - beta2) * g^2
    p <- p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

and nothing at all when should_skip != 0. Everything that the device decides (step, lr, clip_scale, should_skip)
is a tensor, so that the host never waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import use_reference


@torch.no_grad()
def adamw_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Tensor,
    clip_scale: Tensor,
    should_skip: Tensor,
) -> None:
    beta1, beta2 = betas
    skip = should_skip != 0
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        g = grad * clip_scale
        m = beta1 * exp_avg + (1 - beta1) * g
        v = beta2 * exp_avg_sq + (1 - beta2) * g.square()
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        p = param * (1 - lr * weight_decay) - lr * update
        for target, value in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            target.copy_(torch.where(skip, target, value))


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Tensor,
    clip_scale: Tensor,
    should_skip: Tensor,
) -> None:
    """One step of AdamW on every tensor of the lists.

    Args:
        params, exp_avgs, exp_avg_sqs: fp32 tensors, changed in place; under FSDP2 the local shards.
        grads: fp32, shapes of params. Scratch: they may hold clip_scale * grad afterwards.
        lr, step, clip_scale, should_skip: scalar tensors on the device of params. `step` is 1 for the first
            update; clip_scale is positive; a should_skip other than 0 leaves params and moments untouched.
        betas, eps, weight_decay: as in the formula above.
    Raises:
        ValueError: lists of different length, or tensors of different shape.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        raise ValueError(f"{len(params)} params, {len(grads)} grads, {len(exp_avgs)} and {len(exp_avg_sqs)} moments")
    for index, tensors in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if len({tensor.shape for tensor in tensors}) > 1:
            raise ValueError(f"tensor {index}: shapes differ: {[tuple(tensor.shape) for tensor in tensors]}")
    if not params:
        return
    if use_reference():
        adamw_reference(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            clip_scale=clip_scale,
            should_skip=should_skip,
        )
        return
    torch._fused_adamw_(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [step.float()] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=clip_scale.float().reciprocal(),  # torch divides by its scale
        found_inf=(should_skip != 0).float(),
    )
