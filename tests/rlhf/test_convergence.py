"""The real loop learns what it must: closed forms on one step, known targets on several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.optim import OptimConfig
from rlhf.ppo_config import AlgorithmConfig, KlConfig, RewardConfig, RolloutConfig, ValueConfig
from tests.rlhf.toys import END, Rows, next_probabilities, small_model, toy

# The eight tokens of the one-step problem and what each is worth.
REWARDS = [-0.8, 0.2, 0.9, -0.3, 0.6, -0.6, 0.0, 0.7]
BETA = 0.5
PROMPT = [1]
VOCABULARY = 8


def adam(lr: float) -> OptimConfig:
    return OptimConfig(lr=lr, eps=1e-5, weight_decay=0.0)


def closed_form(reference: Tensor, beta: float) -> Tensor:
    """The maximum of E[r] - beta KL(pi, reference): reference exp(r / beta) / Z (Rafailov et al. 2023, eq. 4)."""
    weighted = reference * torch.exp(torch.tensor(REWARDS, dtype=torch.float64) / beta)
    return weighted / weighted.sum()


def total_variation(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().sum().item() / 2


ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"ppo": AlgorithmConfig(advantage="gae", epochs=2), "kl": KlConfig(coef=BETA)},
    "rloo": {"ppo": AlgorithmConfig(advantage="rloo", epochs=2, whiten=False), "kl": KlConfig(coef=BETA)},
    "grpo": {"ppo": AlgorithmConfig(advantage="group", epochs=2), "kl": KlConfig(coef=BETA)},
}


def learn_one_step(
    folder: Path, iterations: int, answers: int, samples: int, lr: float, **algorithm: Any
) -> tuple[Tensor, Tensor]:
    """The reference's probabilities, and the learned policy's."""
    problem = toy(
        folder,
        small_model(VOCABULARY, 2),
        [PROMPT],
        lambda ids: REWARDS[ids[0]],
        iterations,
        contrast=5.0,
        rollout=RolloutConfig(prompts=answers // samples, samples=samples, max_new_tokens=1),
        reward=RewardConfig(missing_end_penalty=0.0),
        optim=adam(lr),
        value=ValueConfig(lr=1e-2, clip=0.0),
        **algorithm,
    )
    reference = next_probabilities(problem.reference, PROMPT, VOCABULARY)
    problem.run()
    return reference, next_probabilities(problem.policy, PROMPT, VOCABULARY)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_step_ends_at_the_closed_form(tmp_path: Path, name: str) -> None:
    samples = 1 if name == "ppo" else 16
    reference, learned = learn_one_step(tmp_path, 30, 128, samples, 2e-3, **ALGORITHMS[name])
    target = closed_form(reference, BETA)
    assert total_variation(reference, target) > 0.3, "there is something to learn"
    assert total_variation(learned, target) < 0.03


def test_grpo_with_the_divergence_in_the_loss_ends_at_its_closed_form(tmp_path: Path) -> None:
    """A group's mean holds the answer itself, so of G answers' rewards a share of 1 / G is lost; a divergence in the
    loss is not: beta counts for G / (G - 1) times as much. Dividing by the deviation would scale rewards alone, too."""
    algorithm = AlgorithmConfig(advantage="group", epochs=1, whiten=False)
    reference, learned = learn_one_step(
        tmp_path, 40, 256, 16, 3e-3, ppo=algorithm, kl=KlConfig(coef=BETA, place="loss")
    )
    assert total_variation(learned, closed_form(reference, BETA * 16 / 15)) < 0.03


@pytest.fixture(scope="module")
def counting(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """PPO with four passes of two steps over each rollout, rewarded for tokens that follow the one before."""

    def follows(ids: list[int]) -> float:
        return sum(b == (a + 1) % VOCABULARY for a, b in zip([*PROMPT, *ids], ids, strict=False)) / len(ids)

    return toy(
        tmp_path_factory.mktemp("counting"),
        small_model(VOCABULARY, 16),
        [PROMPT],
        follows,
        iterations=30,
        rollout=RolloutConfig(prompts=64, max_new_tokens=8),
        reward=RewardConfig(missing_end_penalty=0.0),
        kl=KlConfig(coef=0.0),
        ppo=AlgorithmConfig(epochs=4, minibatches=2),
        optim=adam(3e-3),
        value=ValueConfig(lr=1e-2),
    ).run()


def test_a_known_target_is_reached(counting: Rows) -> None:
    rewards = counting.of("objective/reward_mean")
    assert rewards[0] < 0.2  # one in eight
    assert min(rewards[-5:]) > 0.95


def test_four_passes_over_a_rollout_stay_stable(counting: Rows) -> None:
    assert sum(counting.of("policy/skipped")) == 0
    # The clip range is 0.2, beyond which nothing pulls: most actions never leave it.
    assert max(counting.of("policy/clip_fraction")) < 0.5
    assert all(0.8 < ratio < 1.2 for ratio in counting.of("policy/ratio_mean"))
    entropy = counting.of("objective/entropy")
    assert entropy[0] == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=0.05) and entropy[-1] < entropy[0] / 4


def test_the_critic_comes_to_explain_the_returns(counting: Rows) -> None:
    explained = counting.of("value/explained_variance")
    assert explained[0] == 0, "its head is of zeros at first"
    middle = len(explained) // 2
    # Later there is little left to explain: all answers are right.
    assert max(explained[middle - 5 : middle + 5]) > 0.3


def test_no_pass_begins_off_policy(counting: Rows) -> None:
    assert max(counting.of("sampler/logprob_diff_max")) < 1e-5


def test_a_reward_of_minus_the_length_teaches_to_stop(tmp_path: Path) -> None:
    problem = toy(
        tmp_path,
        small_model(VOCABULARY, 16),
        [PROMPT],
        lambda ids: -float(len(ids)),
        iterations=25,
        stop_ids=[END],
        rollout=RolloutConfig(prompts=32, max_new_tokens=12),
        reward=RewardConfig(missing_end_penalty=0.0),
        kl=KlConfig(coef=0.0),
        optim=adam(3e-3),
        value=ValueConfig(lr=1e-2),
    )
    before = next_probabilities(problem.policy, PROMPT, VOCABULARY)[END]
    rows = problem.run()
    assert before < 0.2
    assert next_probabilities(problem.policy, PROMPT, VOCABULARY)[END] > 0.95
    assert rows[-1]["response/length_mean"] < 1.1 and rows[-1]["response/truncated"] == 0
