"""Losses against numbers worked out by hand, above all where no gradient may come back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from engine.step import Loss
from rlhf.micro_batches import Slice
from rlhf.objectives import (
    POLICY_SUMS,
    VALUE_SUMS,
    PolicyOptions,
    policy_objective,
    policy_statistics,
    value_objective,
    value_statistics,
)
from rlhf.trajectory import Trajectory
from tests.rlhf.trajectories import Fixed, made_of, one_slice


def on_actions(trajectory: Trajectory, values: Sequence[float]) -> Tensor:
    """[T] with these numbers at the actions, in order."""
    spread = torch.zeros(len(trajectory.tokens))
    spread[trajectory.actions] = torch.tensor(values)
    return spread


def looked_at(own: Slice, model: Fixed, loss: Loss, of: str = "said") -> list[float]:
    """The gradient of the loss's total at the trajectory's actions; nothing comes back anywhere else."""
    loss.total.backward()
    gradient = getattr(model, of).grad
    assert not gradient[~own.actions].any()
    spread = torch.zeros(len(own.trajectory.tokens))
    own.put(gradient, spread)
    return spread[own.trajectory.actions].tolist()


def policy_loss(
    ratios: Sequence[float], advantages: Sequence[float], options: PolicyOptions, entropy: float = 0.0
) -> tuple[Loss, list[float]]:
    """The loss of a policy whose ratios to the old one are these, and its gradient by log-probability.

    Sums over actions: a sample of two tokens' prompt for each ratio but the last two, which are one sample's.
    """
    trajectory = made_of([(2, 1)] * (len(ratios) - 2) + [(3, 2)])
    old = on_actions(trajectory, [-1.0 - 0.1 * number for number in range(len(ratios))])
    trajectory = trajectory.replace(old_logprob=old, advantages=on_actions(trajectory, advantages))
    own = one_slice(trajectory)
    said = own.take(old + on_actions(trajectory, [math.log(ratio) for ratio in ratios]))
    said = said.where(own.actions, 9.0)  # what stands elsewhere must not matter
    model = Fixed(said, torch.full_like(said, entropy))
    loss = policy_objective(options, 1.0)(model, own)
    return loss, looked_at(own, model, loss)


RATIOS = [1.0, 1.1, 1.3, 0.9, 0.7, 1.0, 1.1, 1.3, 0.9, 0.7]
SIGNS = [2.0] * 5 + [-2.0] * 5


def test_the_gradient_is_zero_exactly_where_the_clip_says_so() -> None:
    """A > 0 and r > 1 + eps, or A < 0 and r < 1 - eps; elsewhere it is -r A."""
    loss, gradient = policy_loss(RATIOS, SIGNS, PolicyOptions(clip=0.2))
    expected = [
        0.0 if (a > 0 and r > 1.2) or (a < 0 and r < 0.8) else -r * a for r, a in zip(RATIOS, SIGNS, strict=True)
    ]
    assert gradient == pytest.approx(expected, rel=1e-5)
    assert expected.count(0.0) == 2
    by_hand = [-2.0, -2.2, -2.4, -1.8, -1.4, 2.0, 2.2, 2.6, 1.8, 1.6]
    assert loss.total.item() == pytest.approx(sum(by_hand), rel=1e-5)
    assert loss.count.item() == 10


def test_the_range_may_reach_further_up_than_down() -> None:
    ratios, advantages = [1.25, 1.35, 0.75, 0.85], [1.0, 1.0, -1.0, -1.0]
    _, gradient = policy_loss(ratios, advantages, PolicyOptions(clip=0.2, clip_high=0.28))
    assert gradient == pytest.approx([-1.25, 0.0, 0.0, 0.85], rel=1e-5)


def test_dual_clip_bounds_what_a_bad_action_costs() -> None:
    ratios, advantages = [2.0, 4.0, 4.0, 1.0], [-1.0, -1.0, 1.0, -1.0]
    loss, gradient = policy_loss(ratios, advantages, PolicyOptions(dual_clip=3.0))
    assert gradient == pytest.approx([2.0, 0.0, 0.0, 1.0], rel=1e-5)
    assert loss.total.item() == pytest.approx(2.0 + 3.0 - 1.2 + 1.0, rel=1e-5)
    assert loss.shown is not None
    assert policy_statistics((loss.shown / loss.count).tolist())["policy/dual_clip_fraction"] == 0.25
    unbounded, _ = policy_loss(ratios, advantages, PolicyOptions())
    assert unbounded.total.item() == pytest.approx(2.0 + 4.0 - 1.2 + 1.0, rel=1e-5)


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    loss, gradient = policy_loss([math.exp(90), math.exp(-90), 1.0], [-1.0, 1.0, 1.0], PolicyOptions())
    assert loss.total.isfinite() and all(map(math.isfinite, gradient))
    assert loss.total.item() == pytest.approx(math.exp(20), rel=1e-5)


def test_the_entropy_bonus_is_taken_off_the_loss() -> None:
    plain, _ = policy_loss([1.0] * 4, [1.0] * 4, PolicyOptions(), entropy=2.5)
    with_bonus, _ = policy_loss([1.0] * 4, [1.0] * 4, PolicyOptions(entropy=0.1), entropy=2.5)
    assert with_bonus.total.item() == pytest.approx(plain.total.item() - 0.1 * 4 * 2.5)
    assert with_bonus.reported.item() == plain.reported.item()


def test_entropy_is_pushed_up_at_actions_alone() -> None:
    trajectory = made_of([(2, 2), (3, 1)])
    zeros = torch.zeros(len(trajectory.tokens))
    own = one_slice(trajectory.replace(old_logprob=zeros, advantages=zeros))
    model = Fixed(own.take(zeros))
    loss = policy_objective(PolicyOptions(entropy=0.3), 1.0)(model, own)
    assert looked_at(own, model, loss, "entropy") == pytest.approx([-0.3] * 3)


@pytest.mark.parametrize("kind, pull", [("k2", lambda x: x), ("k3", lambda x: 1 - math.exp(-x))])
def test_the_divergence_as_a_loss_pulls_towards_the_reference(kind: str, pull) -> None:
    trajectory = made_of([(2, 3)])
    new, reference = [-1.0, -2.0, -3.0], [-1.5, -1.0, -3.0]
    zeros = torch.zeros(len(trajectory.tokens))
    trajectory = trajectory.replace(
        old_logprob=on_actions(trajectory, new),
        advantages=zeros,
        reference_logprob=on_actions(trajectory, reference),
    )
    own = one_slice(trajectory)
    model = Fixed(own.take(trajectory.old_logprob))  # type: ignore[arg-type]
    loss = policy_objective(PolicyOptions(kl_coef=0.5, kl=kind), 1.0)(model, own)  # type: ignore[arg-type]
    expected = [0.5 * pull(a - b) for a, b in zip(new, reference, strict=True)]
    assert looked_at(own, model, loss) == pytest.approx(expected, rel=1e-5)
    assert expected[0] > 0 > expected[1]


def test_statistics_are_means_over_actions_alone() -> None:
    loss, _ = policy_loss(RATIOS, SIGNS, PolicyOptions(clip=0.2), entropy=1.5)
    assert loss.shown is not None and len(loss.shown) == len(POLICY_SUMS)
    statistics = policy_statistics((loss.shown / loss.count).tolist())
    ratios = torch.tensor(RATIOS, dtype=torch.float64)
    expected = {
        "policy/loss": loss.total.item() / 10,
        "policy/clip_fraction": 0.2,
        "policy/dual_clip_fraction": 0.0,
        "policy/approx_kl": (ratios.log().square() / 2).mean().item(),
        "policy/ratio_mean": ratios.mean().item(),
        "policy/ratio_variance": ratios.var(correction=0).item(),
        "policy/entropy": 1.5,
        "policy/kl_loss": 0.0,
    }
    assert statistics == pytest.approx(expected, rel=1e-5, abs=1e-9)


def value_loss(
    values: Sequence[float], old: Sequence[float], returns: Sequence[float], clip: float
) -> tuple[Loss, list[float]]:
    trajectory = made_of([(2, 1)] * (len(values) - 2) + [(3, 2)])
    trajectory = trajectory.replace(
        values=on_actions(trajectory, old) + 77.0 * ~trajectory.actions,
        returns=on_actions(trajectory, returns),
    )
    own = one_slice(trajectory)
    said = own.take(on_actions(trajectory, values)).where(own.actions, 55.0)
    model = Fixed(said)
    loss = value_objective(clip)(model, own)
    return loss, looked_at(own, model, loss)


def test_the_value_loss_is_half_the_larger_square_and_clips_around_old_values() -> None:
    """Columns: within the range; beyond it towards the return; beyond it away from the return; past the return."""
    values, old, returns = [0.1, 1.0, -1.0, 3.0], [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 1.5]
    loss, gradient = value_loss(values, old, returns, clip=0.2)
    # Clipped values: 0.1, 0.2, -0.2, 0.2.
    squares = [(0.1 - 2) ** 2, max(1.0, 1.8**2), max(9.0, 2.2**2), max(1.5**2, 1.3**2)]
    assert loss.total.item() == pytest.approx(sum(squares) / 2, rel=1e-5)
    # The clipped square is larger in the second alone: no gradient there.
    assert gradient == pytest.approx([0.1 - 2, 0.0, -1.0 - 2, 3.0 - 1.5], rel=1e-5)
    assert loss.shown is not None
    assert value_statistics((loss.shown / loss.count).tolist())["value/clip_fraction"] == 0.25


def test_without_a_clip_the_value_loss_is_half_the_square() -> None:
    loss, gradient = value_loss([1.0, -1.0, 3.0], [0.0, 0.0, 0.0], [2.0, 2.0, 1.5], clip=0.0)
    assert loss.total.item() == pytest.approx((1 + 9 + 2.25) / 2)
    assert gradient == pytest.approx([-1.0, -3.0, 1.5])


def test_explained_variance_by_hand() -> None:
    values, returns = [1.0, 2.0, 2.5, 4.0], [1.5, 1.5, 3.0, 5.0]
    loss, _ = value_loss(values, values, returns, clip=0.2)
    assert loss.shown is not None and len(loss.shown) == len(VALUE_SUMS)
    of = torch.tensor(returns, dtype=torch.float64)
    error = of - torch.tensor(values, dtype=torch.float64)
    statistics = value_statistics((loss.shown / loss.count).tolist())
    expected = 1 - error.var(correction=0) / of.var(correction=0)
    assert statistics["value/explained_variance"] == pytest.approx(expected.item(), rel=1e-9)
    assert statistics["value/loss"] == pytest.approx(error.square().mean().item() / 2)
    constant, _ = value_loss(values, values, [2.0] * 4, clip=0.2)
    assert constant.shown is not None
    assert value_statistics((constant.shown / 4).tolist())["value/explained_variance"] == 0.0


def test_losses_are_fp32() -> None:
    loss, _ = value_loss([1.0, 2.0, 3.0], [1.0] * 3, [2.0] * 3, clip=0.2)
    ratio, _ = policy_loss([1.0, 1.1, 0.9], [1.0] * 3, PolicyOptions())
    assert loss.total.dtype == ratio.total.dtype == torch.float32
