"""Rewards and advantages, against definitions written out in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.advantages import gae_advantages, group_advantages, rloo_advantages, shaped_rewards, whiten
from rlhf.trajectory import Trajectory
from tests.rlhf.trajectories import made_of, some_samples, spans


def judged(seed: int = 0, count: int = 12) -> Trajectory:
    """A trajectory with random scores, log-probabilities and values."""
    random = torch.Generator().manual_seed(seed)
    trajectory = Trajectory.of(some_samples(count, seed), "cpu")
    old, reference = (torch.randn(len(trajectory.tokens), generator=random) * trajectory.actions for _ in range(2))
    return trajectory.replace(
        score=torch.randn(trajectory.num_samples, generator=random),
        old_logprob=old,
        reference_logprob=reference,
        values=torch.randn(len(trajectory.tokens), generator=random),
    )


def gae_by_definition(trajectory: Trajectory, gamma: float, lam: float, bootstrap: bool) -> torch.Tensor:
    """A_t = sum over l of (gamma lam)^l delta_{t + l}, term by term."""
    assert trajectory.rewards is not None and trajectory.values is not None
    rewards, values = trajectory.rewards.double(), trajectory.values.double()
    advantages = torch.zeros(len(rewards), dtype=torch.float64)
    for number, span in enumerate(spans(trajectory)):
        after = values[span.stop] if bootstrap and not trajectory.ended[number] else torch.zeros(())
        following = torch.cat([values[span][1:], after.double().view(1)])
        delta = rewards[span] + gamma * following - values[span]
        steps = span.stop - span.start
        for t in range(steps):
            for later in range(t, steps):
                advantages[span.start + t] += (gamma * lam) ** (later - t) * delta[later]
    return advantages


def test_the_score_is_the_reward_of_the_last_action_alone() -> None:
    trajectory = judged()
    trajectory = trajectory.replace(reference_logprob=trajectory.old_logprob)
    rewards = shaped_rewards(trajectory, 0.5, "k1")
    assert torch.equal(rewards[trajectory.last_action], trajectory.score)
    assert rewards.count_nonzero() == trajectory.num_samples


def test_every_action_pays_for_its_divergence_and_the_last_one_gets_the_score_too() -> None:
    trajectory = judged()
    rewards = shaped_rewards(trajectory, 0.3, "k1")
    assert trajectory.old_logprob is not None and trajectory.reference_logprob is not None
    expected = -0.3 * (trajectory.old_logprob - trajectory.reference_logprob)
    for number, span in enumerate(spans(trajectory)):
        expected[span.stop - 1] += trajectory.score[number]
    torch.testing.assert_close(rewards, expected)
    assert not rewards[~trajectory.actions].any()


@pytest.mark.parametrize("truncated", ["zero", "bootstrap"])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_its_definition_on_ragged_answers(gamma: float, lam: float, truncated: str) -> None:
    trajectory = judged()
    trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.1, "k1"))
    advantages, returns = gae_advantages(trajectory, gamma, lam, truncated)  # type: ignore[arg-type]
    expected = gae_by_definition(trajectory, gamma, lam, truncated == "bootstrap")
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=1e-5)
    assert trajectory.values is not None
    torch.testing.assert_close(returns, (advantages + trajectory.values) * trajectory.actions, atol=1e-5, rtol=1e-5)


def test_a_cut_answer_goes_on_being_worth_its_value_only_where_that_is_asked_for() -> None:
    trajectory = judged()
    trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.0, "k1"))
    zero, _ = gae_advantages(trajectory, 1.0, 1.0, "zero")
    bootstrap, _ = gae_advantages(trajectory, 1.0, 1.0, "bootstrap")
    assert trajectory.values is not None
    worth = trajectory.values[trajectory.last_token]
    difference = (bootstrap - zero)[trajectory.last_action]
    torch.testing.assert_close(difference[~trajectory.ended], worth[~trajectory.ended])
    assert not difference[trajectory.ended].any() and trajectory.ended.any() and not trajectory.ended.all()


def test_without_values_and_divergence_every_advantage_is_the_score() -> None:
    trajectory = judged()
    trajectory = trajectory.replace(values=torch.zeros(len(trajectory.tokens)))
    trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.0, "k1"))
    advantages, _ = gae_advantages(trajectory, 1.0, 1.0)
    for number, span in enumerate(spans(trajectory)):
        assert (advantages[span] == trajectory.score[number]).all()
    assert advantages.count_nonzero() == trajectory.actions.sum()


def test_what_stands_outside_the_actions_changes_nothing() -> None:
    trajectory = judged()
    rewards = shaped_rewards(trajectory, 0.1, "k1")
    plain = gae_advantages(trajectory.replace(rewards=rewards), 1.0, 0.95)
    assert trajectory.values is not None
    garbage = torch.full_like(rewards, torch.nan)
    dirty = trajectory.replace(
        rewards=rewards.where(trajectory.actions, garbage), values=trajectory.values.where(trajectory.actions, garbage)
    )
    for clean, other in zip(plain, gae_advantages(dirty, 1.0, 0.95), strict=True):
        assert torch.equal(clean, other)
    values = torch.randn(len(rewards))
    mask = trajectory.actions
    assert torch.equal(whiten(values, mask), whiten(values.where(mask, garbage), mask))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.booleans())
def test_groups_are_those_of_a_prompt_wherever_their_answers_stand(seed: int, scale: bool) -> None:
    """Against a loop over prompts whose answers, of unequal number, are scattered."""
    random = np.random.default_rng(seed)
    samples = [dataclasses.replace(sample, prompt=int(random.integers(0, 5))) for sample in some_samples(14, seed)]
    trajectory = Trajectory.of(samples, "cpu")
    score = torch.from_numpy(random.standard_normal(14)).float()
    trajectory = trajectory.replace(score=score, rewards=torch.zeros(len(trajectory.tokens)))
    trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.0, "k1"))
    grouped, left_out = group_advantages(trajectory, scale), rloo_advantages(trajectory)
    exact = score.double().tolist()
    for number, span in enumerate(spans(trajectory)):
        own = np.array([exact[i] for i in range(14) if samples[i].prompt == samples[number].prompt])
        others = [exact[i] for i in range(14) if samples[i].prompt == samples[number].prompt and i != number]
        expected = (exact[number] - own.mean()) / ((own.std() + 1e-4) if scale else 1)
        torch.testing.assert_close(grouped[span], torch.full_like(grouped[span], float(expected)))
        baseline = np.mean(others) if others else exact[number]
        expected = float(exact[number] - baseline)
        torch.testing.assert_close(left_out[span], torch.full_like(left_out[span], expected), atol=1e-6, rtol=1e-5)
    for advantages in (grouped, left_out):
        assert not advantages[~trajectory.actions].any()


def with_scores(score: list[float], prompts: list[int]) -> Trajectory:
    trajectory = made_of([(2, 1 + number % 3) for number in range(len(score))], prompts)
    trajectory = trajectory.replace(score=torch.tensor(score))
    return trajectory.replace(rewards=shaped_rewards(trajectory, 0.0, "k1"))


def test_two_answers_by_hand() -> None:
    trajectory = with_scores([3.0, 1.0], [4, 4])
    torch.testing.assert_close(
        group_advantages(trajectory)[trajectory.last_action], torch.tensor([1.0, -1.0]) / (1 + 1e-4)
    )
    assert rloo_advantages(trajectory)[trajectory.last_action].tolist() == [2.0, -2.0]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -7.3])
def test_equal_scores_say_exactly_nothing(value: float) -> None:
    trajectory = with_scores([value] * 7, [0, 1, 0, 1, 0, 1, 1])
    assert not group_advantages(trajectory).any()
    assert not group_advantages(trajectory, scale=False).any()
    assert rloo_advantages(trajectory).abs().max() == 0


def test_scores_that_differ_by_rounding_say_almost_nothing() -> None:
    trajectory = with_scores([1.0, 1.0 + 2**-23], [0, 0])
    assert group_advantages(trajectory).abs().max() < 1e-3


def test_an_answer_alone_has_nothing_to_be_compared_with() -> None:
    trajectory = with_scores([5.0, 1.0, 2.0], [0, 1, 1])
    for advantages in (group_advantages(trajectory), rloo_advantages(trajectory)):
        assert advantages.isfinite().all()
        assert not advantages[spans(trajectory)[0]].any()
        assert advantages[spans(trajectory)[1]].all()


def test_an_answers_divergence_counts_in_its_group() -> None:
    trajectory = judged()
    trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.2, "k1"))
    assert trajectory.old_logprob is not None and trajectory.reference_logprob is not None
    assert trajectory.score is not None
    kl = trajectory.sum_by_sample(trajectory.old_logprob - trajectory.reference_logprob)
    reward = trajectory.score - 0.2 * kl
    first, second = reward[0::2], reward[1::2]
    advantages = rloo_advantages(trajectory)[trajectory.last_action]
    torch.testing.assert_close(advantages[0::2], first - second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(advantages[1::2], second - first, atol=1e-5, rtol=1e-5)


def test_whitening_by_hand_divides_by_n() -> None:
    values, mask = torch.tensor([1.0, 2.0, 6.0, 100.0]), torch.tensor([True, True, True, False])
    deviation = np.sqrt((4 + 1 + 9) / 3)
    expected = torch.tensor([-2, -1, 3, 0]) / deviation
    torch.testing.assert_close(whiten(values, mask), expected.float())
    kept = whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept, (expected + torch.tensor([3, 3, 3, 0])).float())


def test_whitening_takes_all_actions_together() -> None:
    """Not by minibatch, by sample or by rank: samples that differ in their means go on differing."""
    trajectory = made_of([(2, 3), (4, 2), (1, 5)])
    values = trajectory.by_token(torch.tensor([1.0, -2.0, 0.5])) + 0.1 * torch.randn(len(trajectory.tokens))
    chosen = values[trajectory.actions].double()
    white = whiten(values, trajectory.actions)[trajectory.actions].double()
    torch.testing.assert_close(white, (chosen - chosen.mean()) / chosen.std(correction=0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_whitening_equal_numbers_gives_zeros(count: int) -> None:
    mask = torch.arange(6) < count
    assert torch.equal(whiten(torch.full((6,), 0.3), mask), torch.zeros(6))
