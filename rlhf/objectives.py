"""What an update minimises, as sums over actions; `engine.step` divides by the minibatch's count of them.

With the ratio r = policy(a) / old policy(a), the advantage A, and the value V against the return R:

    policy   -min(r A, clip(r, 1 - clip, 1 + clip_high) A)          (Schulman et al. 2017, eq. 7)
             where A < 0 not above -dual_clip A                     (Ye et al. 2020, eq. 5)
             - entropy x entropy + kl_coef x estimate of the divergence from the reference
    value    max((V - R)^2, (clip(V, old V - clip, old V + clip) - R)^2) / 2
    mix      coef x mean nats a token of texts, with a count of their own    (PPO-ptx, Ouyang et al. 2022, eq. 2)

All of it is elementwise, in fp32, on [T'] numbers of a micro-batch. Where there is no action, log-probabilities and
advantages are 0 and nothing comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.step import Loss, Objective, next_token_loss
from model.batch import PackedBatch
from rlhf.kl import Estimator, kl_estimate
from rlhf.micro_batches import Slice

# exp(20) = 5e8: a ratio beyond it is an accident, and must not be infinite.
_LARGEST_LOG_RATIO = 20.0

POLICY_SUMS = (
    "loss",
    "clip_fraction",
    "dual_clip_fraction",
    "approx_kl",
    "drift",
    "drift_squared",
    "entropy",
    "kl_loss",
)
VALUE_SUMS = ("loss", "clip_fraction", "mean", "return", "return_squared", "error", "error_squared")


@dataclass(frozen=True)
class PolicyOptions:
    """Of the policy's loss.

    clip, clip_high: the ratio's useful range is 1 - clip to 1 + clip_high (clip, where it is None).
    dual_clip: most that an action with a negative advantage costs, in advantages; None is no bound.
    entropy: weight of the bonus.
    kl_coef: weight of the divergence from the reference as a loss, 0 where it is in the rewards; kl: its estimator.
    """

    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    entropy: float = 0.0
    kl_coef: float = 0.0
    kl: Estimator = "k2"


def policy_objective(options: PolicyOptions, temperature: float) -> Objective[Slice]:
    """The policy's loss over a trajectory with old_logprob and advantages (and reference_logprob, for `kl_coef`)."""
    assert not (options.kl_coef and options.kl == "k1"), "k1 has no gradient on average"
    above = options.clip if options.clip_high is None else options.clip_high

    def objective(model: nn.Module, batch: Slice) -> Loss:
        trajectory, actions = batch.trajectory, batch.actions
        assert trajectory.old_logprob is not None and trajectory.advantages is not None
        advantages = batch.take(trajectory.advantages)
        logprob, entropy, _ = model(batch.batch, temperature, with_entropy=True)
        log_ratio = logprob - batch.take(trajectory.old_logprob)
        ratio = log_ratio.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO).exp()

        unclipped = -ratio * advantages
        clipped = -ratio.clamp(1 - options.clip, 1 + above) * advantages
        loss = torch.maximum(unclipped, clipped)
        is_bounded = torch.zeros_like(actions)
        if options.dual_clip is not None:
            most = -options.dual_clip * advantages
            is_bounded = (advantages < 0) & (loss > most)
            loss = torch.where(is_bounded, most, loss)
        total = loss.sum()
        if options.entropy:
            total = total - options.entropy * entropy.sum()
        divergence = torch.zeros_like(loss)
        if options.kl_coef:
            assert trajectory.reference_logprob is not None
            divergence = kl_estimate(logprob, batch.take(trajectory.reference_logprob), options.kl)
            total = total + options.kl_coef * divergence.sum()

        drift = ratio - 1
        shown = (loss, clipped > unclipped, is_bounded, log_ratio.square() / 2, drift, drift.square(), entropy)
        return _loss(total, loss, actions, (*shown, divergence))

    return objective


def value_objective(clip: float) -> Objective[Slice]:
    """The critic's loss over a trajectory with values and returns.

    Args:
        clip: how far from its old value a value is followed; 0 is any distance.
    """

    def objective(model: nn.Module, batch: Slice) -> Loss:
        trajectory, actions = batch.trajectory, batch.actions
        assert trajectory.values is not None and trajectory.returns is not None
        old, returns = (batch.take(values) for values in (trajectory.values, trajectory.returns))
        value = model(batch.batch)
        squared = (value - returns).square()
        is_clipped = torch.zeros_like(actions)
        loss = squared / 2
        if clip:
            clipped = (old + (value - old).clamp(-clip, clip) - returns).square()
            is_clipped = clipped > squared
            loss = torch.maximum(squared, clipped) / 2
        loss = loss.where(actions, 0)
        error = returns - value
        shown = (loss, is_clipped, value, returns, returns.square(), error, error.square())
        return _loss(loss.sum(), loss, actions, shown)

    return objective


def with_pretraining(objective: Objective[Slice], coef: float, actions_per_target: Tensor) -> Objective[Any]:
    """Beside the policy's loss that of texts, which are further micro-batches of the step: `PackedBatch`es.

    Args:
        coef: weight of the texts' mean loss beside the policy's mean loss.
        actions_per_target: of the whole step, over all ranks: what makes of a sum that is divided by the actions the
            mean over the texts' own targets.
    """
    read = next_token_loss()

    def both(model: nn.Module, batch: Slice | PackedBatch) -> Loss:
        if isinstance(batch, Slice):
            loss = objective(model, batch)
            assert loss.shown is not None
            return loss._replace(shown=torch.cat([loss.shown, loss.shown.new_zeros(1)]))
        text = read(model, batch)
        shown = torch.zeros(len(POLICY_SUMS) + 1, dtype=torch.float64, device=text.reported.device)
        shown[-1] = text.reported * actions_per_target
        none = torch.zeros_like(text.reported)
        return Loss(coef * actions_per_target * text.total, none, none, shown)

    return both


def _loss(total: Tensor, loss: Tensor, actions: Tensor, shown: Sequence[Tensor]) -> Loss:
    sums = torch.stack([values.detach().double().where(actions, 0).sum() for values in shown])
    return Loss(total, loss.detach().sum(), actions.sum().float(), sums)


def policy_statistics(shown: Sequence[float]) -> dict[str, float]:
    """A step's means over actions, under the field's names.

    Args:
        shown: of `POLICY_SUMS`, divided by the count of actions; one more with texts.
    """
    of = dict(zip(POLICY_SUMS, shown, strict=False))
    texts = {"ptx/loss": shown[len(POLICY_SUMS)]} if len(shown) > len(POLICY_SUMS) else {}
    plain = {f"policy/{name}": of[name] for name in POLICY_SUMS if not name.startswith("drift")}
    drift = {
        "policy/ratio_mean": 1 + of["drift"],
        "policy/ratio_variance": max(0.0, of["drift_squared"] - of["drift"] ** 2),
    }
    return {**plain, **drift, **texts}


def value_statistics(shown: Sequence[float]) -> dict[str, float]:
    """A step's means over actions, of the critic as it was before the step.

    Args:
        shown: of `VALUE_SUMS`, divided by the count of actions.
    """
    of = dict(zip(VALUE_SUMS, shown, strict=True))
    of_returns = of["return_squared"] - of["return"] ** 2
    of_errors = of["error_squared"] - of["error"] ** 2
    return {
        "value/loss": of["loss"],
        "value/clip_fraction": of["clip_fraction"],
        "value/mean": of["mean"],
        "value/explained_variance": 1 - of_errors / of_returns if of_returns > 0 else 0.0,
    }
