"""Losses that make better answers score higher, over groups of K answers to one prompt.

With s the scores of a group, g its grades, and z_ij = s_j - s_i + margin (g_i - g_j) for g_i > g_j:

    pairwise        mean over pairs i > j of  log(1 + exp(z_ij))               (Ouyang et al. 2022, eq. 1)
    plackett_luce   mean over i of            log(1 + sum over worse j of exp(z_ij))
                                                                               (Plackett 1975, Luce 1959)
    best            the same, over the best i alone: softmax cross-entropy     (Ziegler et al. 2019, eq. 1)
    + centre x      mean over pairs of        (s_i + s_j)^2                    (Eisenstein et al. 2023, eq. 2)

Equal grades say nothing: such pairs do not count, and an answer competes with those below it, never with its equals. So
without ties `plackett_luce` is the likelihood of the order, by choice; and for two answers all three are the same. The
margin is Llama 2's (Touvron et al. 2023, eq. 2). Every mean is taken within a group, so a prompt counts once, however
many answers it has.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.ranked_batch import RankedBatch

RankingLoss = Literal["pairwise", "plackett_luce", "best"]


def ranking_loss(
    scores: Tensor, batch: RankedBatch, kind: RankingLoss = "pairwise", margin: float = 0.0, centre: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The loss of a batch's groups; nothing here waits for the device.

    Args:
        scores: [D], any float dtype, of each sequence at its end; what stands behind the sequences does not matter.
        margin: for each unit of difference between grades.
        centre: coefficient of the squared sum.
    Returns:
        sum over groups, and how many have different grades: scalars, fp32 (float64 for scores in it). The loss is
        their quotient.
    """
    scores, others, lead, is_same, is_worse = _beside(scores, batch)
    gap = others - scores[:, None] + margin * lead
    pairs = _share(is_worse, batch, scores.dtype)
    if kind == "pairwise":
        total = -(pairs * F.logsigmoid(-gap)).sum()
    else:
        does_choose = is_worse.any(1)
        if kind == "best":
            does_choose &= ~(is_same & (lead < 0)).any(1)
        itself = torch.zeros_like(scores)[:, None]
        choices = torch.cat([itself, gap.masked_fill(~is_worse, -torch.inf)], 1).logsumexp(1, keepdim=True)
        total = (_share(does_choose[:, None], batch, scores.dtype) * choices).sum()
    if centre:
        total = total + centre * (pairs * (scores[:, None] + others).square()).sum()
    return total, (_by_group(is_worse, batch, scores.dtype) > 0).sum().to(scores.dtype)


def ranking_accuracy(scores: Tensor, batch: RankedBatch) -> Tensor:
    """The share of each group's pairs that are in the right order, summed over groups; equal scores count half."""
    scores, others, _, _, is_worse = _beside(scores, batch)
    pairs = _share(is_worse, batch, scores.dtype)
    return (pairs * (1 + (scores[:, None] - others).sign()) / 2).sum()


def pair_means(values: Tensor, batch: RankedBatch) -> tuple[Tensor, Tensor]:
    """A value of the better answer of a pair and of the worse one: means over each group's pairs, summed over groups.

    Args:
        values: [D].
    """
    values, others, _, _, is_worse = _beside(values, batch)
    pairs = _share(is_worse, batch, values.dtype)
    return (pairs * values[:, None]).sum(), (pairs * others).sum()


def _beside(scores: Tensor, batch: RankedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every answer beside all that can be of its group, W = 2 K - 1.

    Returns:
        scores, fp32 or float64 [D]; and [D, W]: scores of the others, by how much grades exceed theirs, whether they
        are of the same group, and whether they are worse.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).where(batch.is_sequence, 0.0)
    grades = batch.grades.to(scores.dtype)
    others, lead = _neighbours(scores, batch, 0.0), grades[:, None] - _neighbours(grades, batch, 0.0)
    is_same = _neighbours(batch.groups, batch, -1) == batch.groups.where(batch.is_sequence, -2)[:, None]
    return scores, others, lead, is_same, is_same & (lead > 0)


def _neighbours(values: Tensor, batch: RankedBatch, padding: float) -> Tensor:
    """[D] -> [D, 2 K - 1]: each value among the K - 1 before it and the K - 1 behind it."""
    reach = batch.most_responses - 1
    return F.pad(values, (reach, reach), value=padding).unfold(0, 2 * reach + 1, 1)


def _share(counted: Tensor, batch: RankedBatch, dtype: torch.dtype) -> Tensor:
    """[D, W] true or false -> [D, W]: what each true one counts, so that those of a group count 1 together."""
    return counted / _by_group(counted, batch, dtype)[batch.groups.clamp(min=0), None].clamp(min=1)


def _by_group(counted: Tensor, batch: RankedBatch, dtype: torch.dtype) -> Tensor:
    """[D, W] true or false -> [D]: how many are true in each group; whole numbers, so their order does not matter."""
    empty = torch.zeros(len(counted), dtype=dtype, device=counted.device)
    return empty.index_add(0, batch.groups.clamp(min=0), counted.sum(1).to(dtype))
