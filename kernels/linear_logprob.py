"""Log-probabilities, entropies and log-sum-exps of a language-model head, a token each, without keeping logits.

    x       = hidden weight^T / temperature                [T, V]
    lse     = log sum exp x,   p = exp(x - lse)
    logprob = x[target] - lse
    entropy = lse - sum_v p_v x_v

    dx = g_logprob (onehot(target) - p) + g_lse p - g_entropy p (x - lse + entropy)

The forward keeps [T] numbers only; the backward forms the logits of a chunk again, at 8 T V d operations in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype, register_op, use_reference
from kernels.vocabulary import IGNORE, HeadProducts, check_head, chunks, counted_rows, log_softmax_, pick, put_back


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    wide = accumulation_dtype(hidden.dtype)
    scale = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    logits = hidden.to(wide) @ weight.to(wide).t() / scale
    counted = targets != IGNORE
    logprobs = logits.log_softmax(dim=-1)
    logprob = logprobs.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1) * counted
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1) * counted if with_entropy else None
    return logprob, entropy, logits.logsumexp(dim=-1) * counted


def _linear_logprob_fwd(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor | None, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = counted_rows(targets)
    picked, labels, temperature = pick(rows, hidden, targets.clamp_min(0).unsqueeze(1), temperature)
    products = HeadProducts(weight)
    logprob, entropy, lse = (torch.zeros(len(picked), dtype=products.wide, device=hidden.device) for _ in range(3))
    for part in chunks(len(picked), len(weight), hidden.dtype, hidden.device):
        x = products.logits(picked[part])
        if temperature is not None:
            x.div_(temperature[part].unsqueeze(1))
        lse[part] = log_softmax_(x)
        logprob[part] = x.gather(1, labels[part]).squeeze(1)
        if with_entropy:
            entropy[part] = -x.exp().mul_(x).sum(dim=-1)
    counted = targets != IGNORE
    logprob, entropy, lse = (put_back(rows, x, targets).where(counted, 0) for x in (logprob, entropy, lse))
    return logprob, entropy, lse


def _linear_logprob_bwd(
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    dlse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor | None,
    entropy: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = counted_rows(targets)
    counted = targets != IGNORE
    dlogprob, dlse = (0 * lse if x is None else x.where(counted, 0) for x in (dlogprob, dlse))
    dentropy = None if dentropy is None else dentropy.where(counted, 0)
    picked, labels, temperature, entropy, lse, dlogprob, dentropy, dlse = pick(
        rows, hidden, targets.clamp_min(0).unsqueeze(1), temperature, entropy, lse, dlogprob, dentropy, dlse
    )
    products = HeadProducts(weight)
    dpicked = torch.empty(picked.shape, dtype=products.wide, device=hidden.device)
    dweight = None
    for part in chunks(len(picked), len(weight), hidden.dtype, hidden.device):
        x = products.logits(picked[part])
        if temperature is not None:
            x.div_(temperature[part].unsqueeze(1))
        x.sub_(lse[part].unsqueeze(1))  # log p
        slope = (dlse[part] - dlogprob[part]).unsqueeze(1)
        if dentropy is not None:
            slope = torch.mul(x, -dentropy[part].unsqueeze(1)).add_(
                slope - (dentropy[part] * entropy[part]).unsqueeze(1)
            )
        dx = x.exp_().mul_(slope)
        dx.scatter_add_(1, labels[part], dlogprob[part].unsqueeze(1))
        if temperature is not None:
            dx.div_(temperature[part].unsqueeze(1))
        dpicked[part] = products.dhidden(dx)
        dweight = products.add_dweight(dweight, dx, picked[part])
    dweight = torch.zeros_like(weight) if dweight is None else dweight.to(weight.dtype)
    return put_back(rows, dpicked.to(hidden.dtype), hidden), dweight


def _fake_fwd(hidden, weight, targets, temperature, with_entropy):
    wide = accumulation_dtype(hidden.dtype)
    return tuple(hidden.new_empty(targets.shape, dtype=wide) for _ in range(3))


def _save(ctx, inputs, output) -> None:
    _, entropy, lse = output
    ctx.with_entropy = inputs[4]
    ctx.save_for_backward(*inputs[:4], entropy, lse)


def _autograd(ctx, dlogprob, dentropy, dlse):
    dentropy = dentropy if ctx.with_entropy else None
    return *_linear_logprob_bwd_op(dlogprob, dentropy, dlse, *ctx.saved_tensors), None, None, None


_linear_logprob_op = register_op(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? temperature, bool with_entropy)"
    " -> (Tensor, Tensor, Tensor)",
    _linear_logprob_fwd,
    _fake_fwd,
    setup_context=_save,
    backward=_autograd,
)
_linear_logprob_bwd_op = register_op(
    "linear_logprob_bwd(Tensor? dlogprob, Tensor? dentropy, Tensor? dlse, Tensor hidden, Tensor weight,"
    " Tensor targets, Tensor? temperature, Tensor entropy, Tensor lse) -> (Tensor, Tensor)",
    _linear_logprob_bwd,
    lambda dlogprob, dentropy, dlse, hidden, weight, *_: (hidden.new_empty(hidden.shape), torch.empty_like(weight)),
)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the head says of each token's target: log-probability, entropy, log-sum-exp.

    Args:
        hidden: [T, d], any float dtype; logits in fp32 (fp64 for fp64).
        weight: [V, d], dtype of hidden. Its gradient is summed over tokens in fp32.
        targets: int64 [T]. Where IGNORE (-100), all three results are 0 and have no gradient.
        temperature: divides the logits; a positive number or fp32 [T]. A constant: it gets no gradient.
        with_entropy: whether the entropy is wanted.
    Returns:
        (logprob [T], entropy [T] in nats or None, logsumexp [T]), fp32, each differentiable with any gradient
        per token. All three speak of the logits after division by the temperature.
    Raises:
        ValueError: shapes do not fit, or a temperature number that is not positive.
    """
    check_head(hidden, weight, targets)
    if isinstance(temperature, Tensor):
        if temperature.shape != targets.shape:
            raise ValueError(f"temperature {tuple(temperature.shape)} for targets {tuple(targets.shape)}")
    elif temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if use_reference():
        return linear_logprob_reference(hidden, weight, targets, temperature, with_entropy)
    heat = temperature if isinstance(temperature, Tensor) else None
    if heat is None and temperature != 1:
        heat = torch.full(targets.shape, temperature, dtype=torch.float32, device=targets.device)
    logprob, entropy, lse = _linear_logprob_op(hidden, weight, targets, heat, with_entropy)
    return logprob, entropy if with_entropy else None, lse
