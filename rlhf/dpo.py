"""Direct preference optimisation: a reward model that is the policy itself (Rafailov et al. 2023).

With log pi(y) the sum of an answer's log-probabilities, its implicit reward is beta (log pi(y) - log pi_ref(y)), and
the loss is that of a reward model with these scores: of two answers -log sigmoid(r_w - r_l), their eq. 7; of K what
`ranking_loss` offers. Label smoothing e takes a share e of the preferences for wrong (cDPO, Mitchell 2023):

    (1 - e) (-log sigmoid(r_w - r_l)) + e (-log sigmoid(r_l - r_w)) = -log sigmoid(r_w - r_l) + e (r_w - r_l)

The reference's log-probabilities are computed once, by the model that will be trained, over the very micro-batches that
training begins with: so at step 0 every reward is 0 and the loss ln 2, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config import check_range
from engine.data.ranked_batch import RankedBatch
from engine.step import Loss, Objective
from model.batch import IGNORE
from model.errors import InputError
from rlhf.ranking_loss import RankingLoss, pair_means, ranking_accuracy, ranking_loss

SHOWN = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
"""Of the better and of the worse answer of a pair, their difference, and how often that is positive."""


@dataclass
class DpoLossConfig:
    """How preferences become a loss."""

    beta: float = 0.1
    """strength of the pull to the reference: rewards are beta times log-ratios"""
    loss: RankingLoss = "pairwise"
    """of K answers: pairwise, every two of them; plackett_luce, their whole order; best, the best against the rest"""
    extremes: bool = False
    """compare only the best of a prompt's answers with the worst"""
    label_smoothing: float = 0.0
    """share of preferences taken for wrong"""
    per_token: bool = False
    """divide an answer's log-ratio by its tokens, so that longer answers do not weigh more"""

    def check(self) -> None:
        """Raises InputError where a value makes no sense, by itself or with another."""
        check_range("dpo", self, 0, "label_smoothing", below=0.5)
        check_range("dpo", self, 1e-6, "beta")
        if self.label_smoothing and self.loss != "pairwise":
            raise InputError("--dpo.label_smoothing is of pairs. Leave --dpo.loss at pairwise, or do without it.")


def sequence_logprobs(model: nn.Module, batch: RankedBatch, per_token: bool = False) -> Tensor:
    """Log-probability of each answer given its prompt: fp32 [D], 0 behind the sequences.

    Args:
        per_token: the mean over an answer's tokens, its end token with them, instead of the sum.
    """
    packed = batch.batch
    logprob = model(packed).logprob  # [T], 0 where there is no target
    size = len(batch.ends)
    places = torch.arange(len(logprob), device=logprob.device)
    owner = torch.bucketize(places, packed.cu_seqlens[1:].long(), right=True).clamp(max=size - 1)

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(size, dtype=values.dtype, device=values.device).index_add(0, owner, values)

    total = sums(logprob)
    return total / sums((packed.targets != IGNORE).to(total.dtype)).clamp(min=1) if per_token else total


def dpo_objective(config: DpoLossConfig, reference: Tensor) -> Objective[RankedBatch]:
    """The loss, a mean over prompts, and what is `SHOWN`.

    Args:
        reference: fp32 [S], log-probabilities of all sequences of the set, by number.
    """

    def objective(model: nn.Module, batch: RankedBatch) -> Loss:
        known = reference[batch.sequence.clamp(min=0)].where(batch.is_sequence, 0.0)
        rewards = config.beta * (sequence_logprobs(model, batch, config.per_token) - known)
        compared = extremes(batch) if config.extremes else batch
        total, count = ranking_loss(rewards, compared, config.loss)
        better, worse = pair_means(rewards, compared)
        if config.label_smoothing:
            total = total + config.label_smoothing * (better - worse)
        accuracy = ranking_accuracy(rewards, compared)
        shown = torch.stack([better, worse, better - worse, accuracy]).detach()
        return Loss(total, total.detach(), count, shown)

    return objective


def extremes(batch: RankedBatch) -> RankedBatch:
    """The same sequences, of which only those with the best and with the worst grade of their group are compared."""
    member = batch.groups.clamp(min=0)

    def extreme(kind: Literal["amax", "amin"]) -> Tensor:
        start = torch.full_like(batch.grades, -torch.inf if kind == "amax" else torch.inf)
        own = batch.grades.where(batch.is_sequence, start)
        return start.scatter_reduce(0, member, own, kind)[member]

    is_extreme = (batch.grades == extreme("amax")) | (batch.grades == extreme("amin"))
    return replace(batch, groups=batch.groups.where(is_extreme, -1))
