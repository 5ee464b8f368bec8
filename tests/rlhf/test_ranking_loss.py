"""The ranking losses against their definitions, written out group by group and pair by pair in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.ranking_loss import RankingLoss, pair_means, ranking_accuracy, ranking_loss
from tests.rlhf.ranked_groups import ranked_groups

KINDS = get_args(RankingLoss)


def log1p_exp(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def by_definition(scores: list[float], grades: list[float], kind: str, margin: float, centre: float) -> float | None:
    """One group's loss; None where all grades are equal."""
    count = range(len(grades))
    pairs = [(i, j) for i, j in itertools.product(count, count) if grades[i] > grades[j]]
    if not pairs:
        return None

    def gap(i: int, j: int) -> float:
        return scores[j] - scores[i] + margin * (grades[i] - grades[j])

    if kind == "pairwise":
        losses = [log1p_exp(gap(i, j)) for i, j in pairs]
    else:
        choosers = {i for i, _ in pairs if kind == "plackett_luce" or grades[i] == max(grades)}
        losses = [math.log(1 + math.fsum(math.exp(gap(i, j)) for k, j in pairs if k == i)) for i in sorted(choosers)]
    squares = [(scores[i] + scores[j]) ** 2 for i, j in pairs]
    return sum(losses) / len(losses) + centre * sum(squares) / len(squares)


def padded(scores: list[list[float]], padding: int = 3) -> Tensor:
    """What stands behind the sequences must not matter, whatever it is."""
    return torch.tensor([*itertools.chain(*scores), *[math.nan] * padding], dtype=torch.float64)


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    """Grades and scores of some groups."""
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    grade, score = st.sampled_from([0.0, 1.0, 2.0, 3.5]), st.floats(-5, 5)
    grades = [draw(st.lists(grade, min_size=size, max_size=size)) for size in sizes]
    return grades, [draw(st.lists(score, min_size=size, max_size=size)) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=groups(), margin=st.sampled_from([0.0, 0.7]), centre=st.sampled_from([0.0, 0.01]), wider=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_loss_is_its_definition_summed_over_groups(
    kind: Any, drawn: Any, margin: float, centre: float, wider: int
) -> None:
    grades, scores = drawn
    batch = ranked_groups(grades, most_responses=max(map(len, grades)) + wider)
    total, count = ranking_loss(padded(scores), batch, kind, margin, centre)
    wanted = [by_definition(*group, kind, margin, centre) for group in zip(scores, grades, strict=True)]
    known = [loss for loss in wanted if loss is not None]
    assert count == len(known)
    assert total.item() == pytest.approx(math.fsum(known), rel=1e-12, abs=1e-12)


def test_loss_of_four_answers_is_the_mean_of_six_pair_losses() -> None:
    scores, grades = [0.3, -1.0, 2.0, 0.5], [4.0, 3.0, 2.0, 1.0]
    alone = [
        ranking_loss(torch.tensor([scores[i], scores[j]]), ranked_groups([[grades[i], grades[j]]], 0))[0]
        for i, j in itertools.combinations(range(4), 2)
    ]
    together, count = ranking_loss(torch.tensor(scores), ranked_groups([grades], 0))
    assert count == 1 and len(alone) == 6
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_two_answers_give_bradley_terry_whatever_the_kind(kind: Any, margin: float) -> None:
    total, _ = ranking_loss(torch.tensor([-0.4, 0.9, 0.0]), ranked_groups([[1.0, 3.0]], 1), kind, margin)
    torch.testing.assert_close(total.item(), -math.log(1 / (1 + math.exp(-(1.3 - 2 * margin)))), rtol=1e-6, atol=0)


def test_order_without_ties_has_plackett_and_luces_likelihood() -> None:
    scores = [0.2, 1.5, -0.7]  # the best first
    weights = [math.exp(score) for score in scores]
    likelihood = weights[0] / sum(weights) * weights[1] / sum(weights[1:])
    total, _ = ranking_loss(torch.tensor(scores), ranked_groups([[3.0, 2.0, 1.0]], 0), "plackett_luce")
    torch.testing.assert_close(total.item(), -math.log(likelihood) / 2, rtol=1e-6, atol=0)


def test_best_is_softmax_cross_entropy() -> None:
    scores = torch.tensor([0.2, 1.5, -0.7, 0.1])
    total, _ = ranking_loss(scores, ranked_groups([[1.0, 5.0, 2.0, 1.0]], 0), "best")
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(scores, torch.tensor(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_answers_and_groups_does_not_matter(kind: Any) -> None:
    grades, scores = [[1.0, 3.0, 3.0, 2.0], [5.0, 4.0]], [[0.1, 0.9, -0.2, 0.4], [1.0, 2.0]]
    wanted = ranking_loss(padded(scores), ranked_groups(grades), kind, 0.3, 0.02)
    for order in itertools.permutations(range(4)):
        shuffled = [grades[1], [grades[0][place] for place in order]]
        moved = [scores[1], [scores[0][place] for place in order]]
        torch.testing.assert_close(ranking_loss(padded(moved), ranked_groups(shuffled), kind, 0.3, 0.02), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_grades_say_nothing(kind: Any) -> None:
    scores = torch.tensor([0.5, -0.5, 1.0], requires_grad=True)
    total, count = ranking_loss(scores, ranked_groups([[2.0, 2.0, 2.0]], 0), kind, 1.0, 1.0)
    assert total == 0 and count == 0
    total.backward()
    assert scores.grad is not None and scores.grad.tolist() == [0, 0, 0]
    # Two equals above a third: each is compared with it, and neither with the other.
    near, far = (
        ranking_loss(torch.tensor([1.0, 1.0 + by, 0.0]), ranked_groups([[2.0, 2.0, 1.0]], 0), kind)[0]
        for by in (0.0, 0.5)
    )
    expected = [log1p_exp(-1.0), (log1p_exp(-1.0) + log1p_exp(-1.5)) / 2]
    torch.testing.assert_close([near.item(), far.item()], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_on_all_scores_changes_nothing_until_they_are_centred(kind: Any) -> None:
    batch = ranked_groups([[1.0, 2.0, 0.0], [0.0, 1.0]], 0)
    scores = torch.tensor([0.3, -0.2, 1.1, 0.4, -0.8], dtype=torch.float64)
    moved = scores + 7.0
    torch.testing.assert_close(ranking_loss(moved, batch, kind), ranking_loss(scores, batch, kind))
    assert ranking_loss(moved, batch, kind, centre=0.01)[0] > ranking_loss(scores, batch, kind, centre=0.01)[0] + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_a_hundred_are_finite_with_the_right_gradients(kind: Any, sign: int) -> None:
    scores = torch.tensor([100.0 * sign, -100.0 * sign], requires_grad=True)
    total, _ = ranking_loss(scores, ranked_groups([[1.0, 0.0]], 0), kind)
    total.backward()
    assert scores.grad is not None
    # Right by 200: no loss and no push. Wrong by 200: a loss of 200 and a push of 1.
    assert total.item() == (0.0 if sign == 1 else 200.0)
    assert scores.grad.tolist() == ([0.0, 0.0] if sign == 1 else [-1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: Any) -> None:
    batch = ranked_groups([[1.0, 3.0, 3.0, 0.0], [2.0, 1.0], [0.0, 0.0, 4.0]])
    scores = torch.randn(len(batch.ends), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda given: ranking_loss(given, batch, kind, 0.4, 0.05)[0], (scores,))


def test_margin_asks_for_more_where_grades_differ_more() -> None:
    scores, batch = torch.tensor([1.0, 0.0]), ranked_groups([[5.0, 2.0]], 0)
    total, _ = ranking_loss(scores, batch, margin=0.25)
    torch.testing.assert_close(total.item(), log1p_exp(-(1.0 - 0.25 * 3)), rtol=1e-6, atol=0)


def test_centring_adds_the_squared_sum_of_each_pair() -> None:
    scores, batch = torch.tensor([1.0, 0.5]), ranked_groups([[1.0, 0.0]], 0)
    added = ranking_loss(scores, batch, centre=0.01)[0] - ranking_loss(scores, batch)[0]
    torch.testing.assert_close(added.item(), 0.01 * 1.5**2, rtol=1e-5, atol=0)


def test_half_precision_scores_are_compared_in_fp32() -> None:
    scores = torch.tensor([3.01, 3.0], dtype=torch.bfloat16)
    total, count = ranking_loss(scores, ranked_groups([[1.0, 0.0]], 0))
    assert total.dtype == count.dtype == torch.float32
    assert total == ranking_loss(scores.float(), ranked_groups([[1.0, 0.0]], 0))[0]


def test_accuracy_is_the_share_of_pairs_in_order_and_equal_scores_count_half() -> None:
    batch = ranked_groups([[3.0, 2.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    # Group 1: right, right, wrong. Group 2: equal. Group 3: nothing to be right about.
    scores = padded([[1.0, 0.0, 0.5], [2.0, 2.0], [0.0, 9.0]])
    assert ranking_accuracy(scores, batch).item() == pytest.approx(2 / 3 + 1 / 2)


def test_pair_means_are_taken_over_better_and_worse_answers() -> None:
    batch = ranked_groups([[3.0, 2.0, 1.0], [0.0, 1.0]])
    better, worse = pair_means(padded([[6.0, 4.0, 1.0], [5.0, 7.0]]), batch)
    # Pairs of group 1: (6, 4), (6, 1), (4, 1).
    assert better.item() == pytest.approx((6 + 6 + 4) / 3 + 7)
    assert worse.item() == pytest.approx((4 + 1 + 1) / 3 + 5)


@pytest.mark.parametrize("kind", KINDS)
def test_host_never_waits_for_a_value(kind: Any) -> None:
    """Tensors without values: whoever asks for one of them is refused."""
    batch = ranked_groups([[1.0, 0.0], [2.0, 1.0, 0.0]]).to("meta")
    scores = torch.zeros(len(batch.ends), device="meta", requires_grad=True)
    total, count = ranking_loss(scores, batch, kind, 0.5, 0.01)
    total.backward()
    assert scores.grad is not None and scores.grad.is_meta and count.is_meta
    assert ranking_accuracy(scores, batch).is_meta
