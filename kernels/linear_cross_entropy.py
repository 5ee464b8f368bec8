"""Cross-entropy of a language-model head, summed over tokens, without keeping logits.

    x   = hidden weight^T                                  logits, [T, V]
    lse = log sum exp x
    nll_sum = sum_t w_t (lse_t - x_t[target_t])            over targets that are not IGNORE
    z_sum   = z_loss * sum_t w_t lse_t^2                   (Chowdhery et al. 2022, PaLM, section 5)

    dx = w (1 + 2 z_loss lse) softmax(x) - w onehot(target)

The sums have one upstream gradient, a scalar, so the gradients of hidden and weight are formed in the forward
pass, while a chunk's logits are at hand, and the backward only scales them: 6 T V d operations, where forming
the logits again would take 8.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.backend import accumulation_dtype, register_op, use_reference
from kernels.vocabulary import IGNORE, HeadProducts, check_head, chunks, counted_rows, log_softmax_, pick, put_back


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(hidden.dtype)
    logits = hidden.to(wide) @ weight.to(wide).t()
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    scale = (targets != IGNORE).to(wide)
    scale = scale if weights is None else scale * weights
    return (scale * nll).sum(), z_loss * (scale * logits.logsumexp(dim=-1).square()).sum()


def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = counted_rows(targets)
    picked, targets, weights = pick(rows, hidden, targets, weights)
    products = HeadProducts(weight)
    scale = (targets != IGNORE).to(products.wide)
    scale = scale if weights is None else scale * weights
    labels = targets.clamp_min(0).unsqueeze(1)

    nll = torch.zeros(len(picked), dtype=products.wide, device=hidden.device)
    lse = torch.zeros_like(nll)
    dpicked = torch.empty(picked.shape if with_grad else (0, 0), dtype=products.wide, device=hidden.device)
    dweight = None
    for part in chunks(len(picked), len(weight), hidden.dtype, hidden.device):
        x = products.logits(picked[part])
        lse[part] = log_softmax_(x)
        nll[part] = -x.gather(1, labels[part]).squeeze(1)
        if with_grad:
            row_scale = scale[part] * (1 + 2 * z_loss * lse[part])
            dx = x.exp_().mul_(row_scale.unsqueeze(1))
            dx.scatter_add_(1, labels[part], -scale[part].unsqueeze(1))
            dpicked[part] = products.dhidden(dx)
            dweight = products.add_dweight(dweight, dx, picked[part])

    if dweight is None:
        dweight = torch.zeros(weight.shape if with_grad else (0, 0), device=weight.device)
    dhidden = put_back(rows, dpicked.to(hidden.dtype), hidden) if with_grad else dpicked.to(hidden.dtype)
    return (scale * nll).sum(), z_loss * (scale * lse.square()).sum(), dhidden, dweight.to(weight.dtype)


def _fake(hidden, weight, targets, weights, z_loss, with_grad):
    wide = accumulation_dtype(hidden.dtype)
    sums = hidden.new_empty((), dtype=wide), hidden.new_empty((), dtype=wide)
    return *sums, *(x.new_empty(x.shape if with_grad else (0, 0)) for x in (hidden, weight))


def _save(ctx, inputs, output) -> None:
    _, _, dhidden, dweight = output
    ctx.has_z_loss = inputs[4] != 0
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dhidden, dweight)


def _autograd(ctx, dnll, dz, *_):
    dhidden, dweight = ctx.saved_tensors
    if ctx.has_z_loss:
        zero = dhidden.new_zeros(())
        dnll, dz = (zero if grad is None else grad for grad in (dnll, dz))
        torch._assert_async(dnll == dz, "nll_sum and z_sum need one upstream gradient: call backward on their sum")
    if dnll is None:
        return (None,) * 6
    return dhidden * dnll.to(dhidden.dtype), dweight * dnll.to(dweight.dtype), None, None, None, None


_linear_cross_entropy_op = register_op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? weights, float z_loss,"
    " bool with_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _linear_cross_entropy,
    _fake,
    setup_context=_save,
    backward=_autograd,
)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the negative log-likelihood and of the z-loss over all targets.

    Args:
        hidden: [T, d], any float dtype; logits and sums in fp32 (fp64 for fp64).
        weight: [V, d], dtype of hidden. Its gradient is summed over tokens in fp32.
        targets: int64 [T], or IGNORE (-100), which adds nothing and has no gradient.
        weights: fp32 [T], a constant factor for each token, or None for 1.
        z_loss: coefficient of the squared log-sum-exp.
    Returns:
        (nll_sum, z_sum), fp32 scalars. Differentiate their sum, scaled as you like: with a z-loss the two
        must receive the same upstream gradient, or the backward raises.
    Raises:
        ValueError: shapes do not fit.
    """
    check_head(hidden, weight, targets)
    if weights is not None and weights.shape != targets.shape:
        raise ValueError(f"weights {tuple(weights.shape)} for targets {tuple(targets.shape)}")
    if use_reference():
        return linear_cross_entropy_reference(hidden, weight, targets, weights, z_loss)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_cross_entropy_op(hidden, weight, targets, weights, z_loss, with_grad)[:2]
