"""What each action was worth: rewards, and three ways from rewards to advantages.

    gae     with a critic, action by action                              (Schulman et al. 2016)
    group   the answer's reward among those to its prompt, over their deviation    (GRPO, Shao et al. 2024)
    rloo    the answer's reward less the mean of the prompt's others     (Ahmadian et al. 2024)

Trajectories are global, so every mean here is over all ranks' samples. Variances are biased (divided by n, not n - 1):
the numbers at hand are the whole of what is centred and scaled. Sums are in float64, where n equal fp32 numbers have
exactly their mean; so a group of equal rewards gives exactly 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels.gae import gae
from rlhf.kl import Estimator, kl_estimate
from rlhf.trajectory import Trajectory

Truncated = Literal["zero", "bootstrap"]
# A group whose rewards differ by rounding alone is not blown up to deviation 1: in units of the reward, as in TRL.
_GROUP_EPS = 1e-4
_WHITEN_EPS = 1e-8  # of a variance, as in Ziegler et al.


def shaped_rewards(trajectory: Trajectory, kl_coef: float, kind: Estimator) -> Tensor:
    """Each action's reward: fp32 [T].

    The score is that of the last action, the end token or where the answer was cut; every action pays `kl_coef` for
    its divergence from the reference, by the policy that sampled it.

    Args:
        trajectory: with score; with old_logprob and reference_logprob where kl_coef is not 0.
    """
    assert trajectory.score is not None
    rewards = torch.zeros_like(trajectory.sampled_logprob)
    if kl_coef:
        assert trajectory.old_logprob is not None and trajectory.reference_logprob is not None
        rewards -= kl_coef * kl_estimate(trajectory.old_logprob, trajectory.reference_logprob, kind)
    # One sample, one last action: no two writes meet.
    rewards[trajectory.last_action] += trajectory.score
    return rewards.where(trajectory.actions, 0)


def gae_advantages(
    trajectory: Trajectory, gamma: float, lam: float, truncated: Truncated = "zero"
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, each fp32 [T].

    Args:
        trajectory: with rewards and values.
        truncated: what a cut answer was still worth: zero, as its score is for what there is of it; or bootstrap, the
            value of the state that it was cut in. An answer that ended is over: 0.
    """
    values, rewards = trajectory.values, trajectory.rewards
    assert values is not None and rewards is not None
    bootstrap = None
    if truncated == "bootstrap":
        bootstrap = values[trajectory.last_token].where(~trajectory.ended, 0)
    return gae(rewards, values, trajectory.cu_seqlens, trajectory.actions, gamma, lam, bootstrap)


def group_advantages(trajectory: Trajectory, scale: bool = True) -> Tensor:
    """Each answer's reward against the mean of its prompt's answers, the same at all of its actions: fp32 [T].

    Args:
        trajectory: with rewards; an answer's is the sum over its actions, divergence included where it is in them.
        scale: divide by the group's deviation (GRPO); not dividing is Dr. GRPO (Liu et al. 2025).
    """
    reward, group, count = _by_prompt(trajectory)
    centred = reward - (_sums(reward, group, count) / count)[group]
    if scale:
        deviation = (_sums(centred.square(), group, count) / count).sqrt()
        centred = centred / (deviation + _GROUP_EPS)[group]
    return trajectory.by_token(centred.float())


def rloo_advantages(trajectory: Trajectory) -> Tensor:
    """Each answer's reward less the mean of the others to its prompt (0 without others), at all its actions: fp32 [T].

    Args:
        trajectory: with rewards; an answer's is the sum over its actions, divergence included where it is in them.
    """
    reward, group, count = _by_prompt(trajectory)
    others = count[group] - 1
    baseline = (_sums(reward, group, count)[group] - reward) / others.clamp(min=1)
    return trajectory.by_token((reward - baseline).where(others > 0, 0).float())


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to deviation 1 where the mask is, and unless asked otherwise to mean 0: fp32 [T], 0 elsewhere."""
    chosen = values.double().where(mask, 0)
    count = mask.sum().clamp(min=1)
    mean = chosen.sum() / count
    variance = (chosen - mean).where(mask, 0).square().sum() / count
    scaled = (chosen - mean) * (variance + _WHITEN_EPS).rsqrt()
    if not shift_mean:
        scaled = scaled + mean
    return scaled.where(mask, 0).float()


def _by_prompt(trajectory: Trajectory) -> tuple[Tensor, Tensor, Tensor]:
    """Each answer's reward float64 [D], its group int64 [D], and the groups' sizes float64 [G]."""
    assert trajectory.rewards is not None
    _, group, count = trajectory.prompt.unique(return_inverse=True, return_counts=True)
    return trajectory.sum_by_sample(trajectory.rewards.double()), group, count.double()


def _sums(values: Tensor, group: Tensor, count: Tensor) -> Tensor:
    """[D] -> [G]"""
    return torch.zeros_like(count).index_add(0, group, values)
