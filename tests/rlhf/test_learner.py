"""What the steps of an iteration pass on to each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlhf.learner
import rlhf.update
from rlhf.micro_batches import Slice, micro_batches
from rlhf.ppo_config import AlgorithmConfig, KlConfig, RewardConfig, RolloutConfig, ValueConfig
from rlhf.trajectory import Trajectory
from tests.rlhf.toys import Toy, small_model, toy


def made(folder: Path, **groups: Any) -> Toy:
    """Answers of up to 6 tokens to prompts of 1 and 3, which may end with token 0."""
    options = {
        "rollout": RolloutConfig(prompts=8, samples=2, max_new_tokens=6),
        "reward": RewardConfig(missing_end_penalty=0.0),
        "ppo": AlgorithmConfig(epochs=2, minibatches=3),
        **groups,
    }
    problem = toy(folder, small_model(8, 16), [[1], [2, 3, 4]], lambda ids: float(ids[0]), 2, stop_ids=[0], **options)
    problem.learner.begin()
    return problem


def sampled(problem: Toy) -> Trajectory:
    learner = problem.learner
    prompts = learner.prompts.next(8)
    return learner.score(prompts, learner.sample(prompts, 2))[0]


def test_models_read_the_very_micro_batches_that_the_update_begins_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere than on a CPU a product's rounding may depend on what lies beside a sample."""
    problem = made(tmp_path)
    seen: list[tuple[str, list[int]]] = []
    for module in (rlhf.learner, rlhf.update):

        def watch(*args: Any, who: str = module.__name__) -> list[Slice]:
            slices = micro_batches(*args)
            seen.extend((who, own.where.tolist()) for own in slices)
            return slices

        monkeypatch.setattr(module, "micro_batches", watch)
    trajectory = problem.learner.estimate(problem.learner.read(sampled(problem), iteration=5))
    problem.learner.update(trajectory, iteration=5)
    by = {name: [where for who, where in seen if who == name] for name in ("rlhf.learner", "rlhf.update")}
    assert len(by["rlhf.learner"]) == 3 and by["rlhf.update"][:3] == by["rlhf.learner"]


def test_the_critic_learns_alone_while_it_warms_up(tmp_path: Path) -> None:
    problem = made(tmp_path, value=ValueConfig(lr=1e-3, warmup=1))
    before = {name: tensor.clone() for name, tensor in problem.learner.tensors().items()}
    for iteration in range(2):
        learner = problem.learner
        report = learner.update(learner.estimate(learner.read(sampled(problem), iteration)), iteration)
        changed = {
            name.partition(".")[0]
            for name, tensor in learner.tensors().items()
            if not torch.equal(tensor, before[name])
        }
        assert changed == ({"critic"} if iteration == 0 else {"critic", "policy"})
        assert ("policy/loss" in report) == (iteration == 1) and report["loss"] == report.get("policy/loss", 0.0)
    assert (problem.roles.policy.steps, problem.learner.numbers()["critic_steps"]) == (6, 12)


def test_the_coefficient_waits_for_the_policy_while_the_critic_warms_up(tmp_path: Path) -> None:
    """The divergence of a policy that may not move says nothing of the coefficient."""
    problem = made(tmp_path, value=ValueConfig(lr=1e-3, warmup=1), kl=KlConfig(coef=0.5, target=1.0, horizon=16))
    learner, seen = problem.learner, []
    for iteration in range(2):
        learner.update(learner.estimate(learner.read(sampled(problem), iteration)), iteration)
        seen.append(learner.kl.coef)
    assert seen == pytest.approx([0.5, 0.4])


def test_the_sampler_may_stand_for_the_policy_that_sampled(tmp_path: Path) -> None:
    problem = made(tmp_path, ppo=AlgorithmConfig(old_logprobs="rollout"))
    trajectory = problem.learner.read(sampled(problem), 0)
    assert trajectory.old_logprob is trajectory.sampled_logprob
    again = made(tmp_path / "again").learner.read(trajectory, 0)
    assert again.old_logprob is not None
    np.testing.assert_allclose(again.old_logprob, trajectory.sampled_logprob, atol=1e-5)


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_the_coefficient_that_was_used_is_reported_and_then_moves(tmp_path: Path, place: Any) -> None:
    problem = made(tmp_path, kl=KlConfig(coef=0.5, target=1.0, horizon=16, place=place))
    learner = problem.learner
    trajectory = learner.estimate(learner.read(sampled(problem), 0))
    # Policy and reference are one model at first: KL is 0, a deviation of -1 from the target, which is clipped to -0.2.
    assert learner.update(trajectory, 0)["objective/kl_coef"] == 0.5
    assert learner.kl.coef == pytest.approx(0.5 * (1 - 0.2 * 16 / 16))
    assert learner.numbers()["kl"] == {"coef": learner.kl.coef}


def test_without_a_weight_there_is_no_reference(tmp_path: Path) -> None:
    problem = made(tmp_path, kl=KlConfig(coef=0.0))
    assert problem.roles.reference is None
    learner = problem.learner
    trajectory = learner.estimate(learner.read(sampled(problem), 0))
    assert trajectory.reference_logprob is None and trajectory.rewards is not None and trajectory.score is not None
    torch.testing.assert_close(trajectory.sum_by_sample(trajectory.rewards), trajectory.score, rtol=0, atol=0)
    assert "objective/kl_coef" not in learner.update(trajectory, 0)


def test_a_look_at_held_out_prompts_changes_nothing(tmp_path: Path) -> None:
    learner = made(tmp_path, reward=RewardConfig(normalise=True)).learner
    learner.score(prompts := learner.prompts.next(8), learner.sample(prompts, 2))
    numbers, tensors = learner.numbers(), {name: tensor.clone() for name, tensor in learner.tensors().items()}
    first, second = (learner.look(prompts[:4]).row for _ in range(2))
    assert first == second and first["held_out/kl"] == 0.0
    assert learner.numbers() == numbers
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in learner.tensors().items())
