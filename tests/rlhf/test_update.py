"""The update as a whole: what is exact at its first minibatch, and what ranks and micro-batches must not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.guard import Guard, GuardConfig
from engine.launch import DivergedError
from engine.mesh import ParallelConfig, Runtime, start
from engine.step import PendingReport, next_token_loss
from model.batch import PackedBatch
from rlhf.advantages import shaped_rewards
from rlhf.kl import kl_estimate
from rlhf.learner import Learner
from rlhf.micro_batches import each_token, micro_batches, minibatches
from rlhf.objectives import PolicyOptions, policy_objective, policy_statistics
from rlhf.ppo_config import AlgorithmConfig, PpoConfig, PpoTrainConfig
from rlhf.trajectory import Trajectory
from rlhf.update import Trained, UpdateOptions, update
from tests.model.tiny import LLAMA, batch, causal_lm
from tests.ranks import run_ranks
from tests.rlhf.trajectories import ALONE, SCORED, first_pass, make, read, some_samples, trained

TEMPERATURE = 0.7


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def prepared(minibatches: int, capacity: int, kl_coef: float = 0.0) -> tuple[nn.Module, nn.Module, Trajectory]:
    policy, critic = make(LLAMA, ALONE), make(SCORED, ALONE)
    trajectory = Trajectory.of(some_samples(), "cpu")
    slices = first_pass(trajectory, minibatches, capacity, ALONE)
    return policy, critic, read(trajectory, policy, critic, slices, ALONE, TEMPERATURE, kl_coef)


def test_on_the_first_minibatch_every_ratio_is_exactly_one() -> None:
    policy, _, trajectory = prepared(minibatches=3, capacity=40)
    objective = policy_objective(PolicyOptions(), TEMPERATURE)
    slices = micro_batches(trajectory, minibatches(trajectory, 3, 0, 0, 0)[0], 40)
    assert len(slices) > 1
    for own in slices:
        loss = objective(policy, own)
        assert loss.shown is not None
        statistics = policy_statistics((loss.shown / loss.count).tolist())
        assert statistics["policy/ratio_mean"] == 1.0
        for name in ("ratio_variance", "approx_kl", "clip_fraction"):
            assert statistics[f"policy/{name}"] == 0.0, name


def first_minibatch_in_bf16() -> list[float]:
    """The largest log-ratio of each micro-batch of this rank's, from sharded weights that are gathered in bf16."""
    runtime = start(ParallelConfig())
    policy = make(LLAMA, runtime, precision="bf16")
    trajectory = Trajectory.of(some_samples(), "cpu")
    trajectory = read(trajectory, policy, None, first_pass(trajectory, 1, 40, runtime), runtime, TEMPERATURE)
    assert trajectory.old_logprob is not None
    largest = []
    for own in micro_batches(trajectory, minibatches(trajectory, 1, 0, 0, 0)[0], 40, runtime.rank, runtime.world):
        logprob = policy(own.batch, TEMPERATURE).logprob
        assert logprob.requires_grad
        largest.append((logprob - own.take(trajectory.old_logprob)).abs().max().item())
    return largest


def test_in_bf16_and_sharded_too_every_first_ratio_is_exactly_one() -> None:
    found = run_ranks(first_minibatch_in_bf16, 2)
    assert len(found[0]) == len(found[1]) > 1
    assert found == [[0.0] * len(found[0])] * 2


def test_one_step_over_everything_has_no_policy_loss() -> None:
    """Advantages of mean 0, ratios of 1, one denominator: their product is rounding alone."""
    policy, critic, trajectory = prepared(minibatches=1, capacity=40)
    report = update(
        trained(policy, ALONE), trained(critic, ALONE), trajectory, UpdateOptions(1, 1, 40, TEMPERATURE), 0, 0, ALONE
    )
    assert abs(report["policy/loss"]) < 1e-6
    assert report["policy/ratio_mean"] == 1.0
    assert report["policy/approx_kl"] == report["policy/clip_fraction"] == report["value/clip_fraction"] == 0.0


def test_only_the_first_minibatch_is_exact() -> None:
    policy, _, trajectory = prepared(minibatches=1, capacity=400)
    options = UpdateOptions(2, 1, 400, TEMPERATURE)
    report = update(trained(policy, ALONE), None, trajectory, options, 0, 0, ALONE)
    assert report["policy/approx_kl"] > 1e-6 and report["policy/ratio_variance"] > 1e-6


def test_a_policy_that_is_its_own_reference_pays_nothing() -> None:
    _, _, trajectory = prepared(minibatches=2, capacity=40)
    assert trajectory.old_logprob is not None and trajectory.reference_logprob is not None
    for kind in ("k1", "k2", "k3"):
        assert not kl_estimate(trajectory.old_logprob, trajectory.reference_logprob, kind).any()  # type: ignore[arg-type]
    rewards = shaped_rewards(trajectory, 10.0, "k3")
    assert torch.equal(rewards[trajectory.last_action], trajectory.score)
    assert rewards.count_nonzero() == trajectory.num_samples


def test_log_probabilities_are_read_in_fp32_under_the_temperature() -> None:
    policy, _, trajectory = prepared(minibatches=1, capacity=400)
    assert trajectory.old_logprob is not None and trajectory.old_logprob.dtype == torch.float32
    slices = first_pass(trajectory, 1, 400, ALONE)
    (own,) = slices
    logits = policy.model(own.batch.tokens, own.batch.positions, own.batch.layout) @ policy.head_weight.t()
    expected = (logits.double() / TEMPERATURE).log_softmax(-1).gather(1, own.batch.targets.clamp(min=0)[:, None])[:, 0]
    found = own.take(trajectory.old_logprob)[own.actions].double()
    torch.testing.assert_close(found, expected[own.actions], atol=1e-5, rtol=0)


def test_training_and_evaluating_models_say_the_same() -> None:
    """Nothing is dropped out, nowhere."""
    trajectory = Trajectory.of(some_samples(), "cpu")
    (own,) = first_pass(trajectory, 1, 400, ALONE)
    for model in (make(LLAMA, ALONE), make(SCORED, ALONE)):
        said = [mode(own.batch) for mode in (model.train(), model.eval())]
        first, second = (one[0] if isinstance(one, tuple) else one for one in said)
        assert torch.equal(first, second)


class Watched(Trained):
    """Keeps what each step was given."""

    def step(self, objective: Any, batches: Sequence[Any], runtime: Runtime) -> PendingReport:
        self.__dict__.setdefault("seen", []).append(batches)
        return super().step(objective, batches, runtime)


def watched(model: nn.Module) -> Watched:
    plain = trained(model, ALONE)
    return Watched(plain.model, plain.optimizer, plain.guard, plain.lr)


def test_steps_are_exactly_epochs_times_minibatches() -> None:
    policy, critic, trajectory = prepared(minibatches=5, capacity=40)
    roles = trained(policy, ALONE), trained(critic, ALONE)
    update(*roles, trajectory, UpdateOptions(3, 5, 40, TEMPERATURE), 0, 0, ALONE)
    for role in roles:
        assert role.steps == role.optimizer.updates == 15
        # Each began with gradients of its own alone.
        assert all(parameter.grad is None for parameter in role.model.parameters())


def test_each_epoch_learns_from_every_sample_once_in_another_order() -> None:
    policy, _, trajectory = prepared(minibatches=5, capacity=40)
    role = watched(policy)
    update(role, None, trajectory, UpdateOptions(2, 5, 40, TEMPERATURE), 0, 0, ALONE)
    steps = [{place for own in slices for place in own.where.tolist()} - {-1} for slices in role.__dict__["seen"]]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(place for places in epoch for place in places) == list(range(len(trajectory.tokens)))
    assert steps[:5] != steps[5:]


def test_what_is_read_before_an_update_is_read_over_its_own_first_micro_batches() -> None:
    policy, _, trajectory = prepared(minibatches=5, capacity=40)
    role, learner = watched(policy), object.__new__(Learner)
    train = PpoTrainConfig(micro_batch_tokens=40)
    learner.config = PpoConfig(seed=9, train=train, ppo=AlgorithmConfig(minibatches=5))
    learner.runtime = ALONE
    update(role, None, trajectory, UpdateOptions(2, 5, 40, TEMPERATURE), 9, 4, ALONE)
    learnt_from = [own for slices in role.__dict__["seen"][:5] for own in slices]
    read_over = learner._slices(trajectory, 4)
    assert [own.where.tolist() for own in read_over] == [own.where.tolist() for own in learnt_from]


def test_each_model_has_a_learning_rate_of_its_own() -> None:
    policy, critic, trajectory = prepared(minibatches=1, capacity=400)
    before = weights(policy), weights(critic)
    roles = trained(policy, ALONE, lr=0.0), trained(critic, ALONE, lr=1e-3)
    report = update(*roles, trajectory, UpdateOptions(2, 1, 400, TEMPERATURE), 0, 0, ALONE)
    assert all(torch.equal(before[0][name], value) for name, value in weights(policy).items())
    assert not any(torch.equal(before[1][name], value) for name, value in weights(critic).items())
    assert report["policy/lr"] == 0.0 and report["value/lr"] == 1e-3


def test_the_critic_may_learn_alone() -> None:
    policy, critic, trajectory = prepared(minibatches=1, capacity=400)
    before = weights(policy)
    report = update(None, trained(critic, ALONE), trajectory, UpdateOptions(4, 1, 400, TEMPERATURE), 0, 0, ALONE)
    assert all(torch.equal(before[name], value) for name, value in weights(policy).items())
    assert not any(name.startswith("policy/") for name in report)


def test_a_critic_learns_the_returns() -> None:
    _, critic, trajectory = prepared(minibatches=1, capacity=400)
    role, options = trained(critic, ALONE, lr=3e-3), UpdateOptions(1, 1, 400, TEMPERATURE, value_clip=0.0)
    reports = [update(None, role, trajectory, options, 0, number, ALONE) for number in range(40)]
    assert reports[0]["value/explained_variance"] < 0.3 < 0.8 < reports[-1]["value/explained_variance"]
    assert reports[-1]["value/loss"] < reports[0]["value/loss"] / 3


def test_better_answers_become_likelier() -> None:
    policy, _, trajectory = prepared(minibatches=2, capacity=400)
    update(trained(policy, ALONE, lr=3e-3), None, trajectory, UpdateOptions(4, 2, 400, TEMPERATURE), 0, 0, ALONE)
    after = each_token(
        trajectory, first_pass(trajectory, 1, 400, ALONE), lambda b: policy(b, TEMPERATURE).logprob, ALONE
    )
    assert trajectory.old_logprob is not None and trajectory.advantages is not None
    moved = (after - trajectory.old_logprob)[trajectory.actions]
    advantages = trajectory.advantages[trajectory.actions]
    assert moved[advantages > 0.5].mean() > 0.05 and moved[advantages < -0.5].mean() < -0.05


def test_what_is_only_read_gets_no_gradient() -> None:
    policy, critic, _ = prepared(minibatches=1, capacity=400)
    reference = make(LLAMA, ALONE, seed=1)
    trajectory = Trajectory.of(some_samples(), "cpu")
    slices = first_pass(trajectory, 1, 400, ALONE)
    trajectory = read(trajectory, policy, critic, slices, ALONE, TEMPERATURE)
    other = each_token(trajectory, slices, lambda b: reference(b, TEMPERATURE).logprob, ALONE)
    trajectory = trajectory.replace(reference_logprob=other)
    held = [getattr(trajectory, field.name) for field in dataclasses.fields(trajectory)]
    assert not any(value.requires_grad for value in held)
    options = UpdateOptions(1, 1, 400, TEMPERATURE, PolicyOptions(kl_coef=0.1))
    update(trained(policy, ALONE), None, trajectory, options, 0, 0, ALONE)
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_a_learning_rate_of_a_millionth_moves_the_masters() -> None:
    """Weights as a bf16 base has them: they move, by less than bf16 could tell."""
    policy, _, trajectory = prepared(minibatches=1, capacity=400)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.bfloat16())
    before, rows = weights(policy), trajectory.tokens.unique()
    update(trained(policy, ALONE, lr=1e-6), None, trajectory, UpdateOptions(1, 1, 400, TEMPERATURE), 0, 0, ALONE)
    moved, rounded = [], []
    for name, after in weights(policy).items():
        old = before[name]
        if name == "model.embed_tokens.weight":
            old, after = old[rows], after[rows]
        moved.append((after != old).float().flatten())
        rounded.append((after.bfloat16() != old).float().flatten())
    assert torch.cat(moved).mean() > 0.99
    assert torch.cat(rounded).mean() < 0.05


def test_a_guard_that_gives_up_ends_the_run_and_leaves_the_weights() -> None:
    policy, _, trajectory = prepared(minibatches=2, capacity=400)
    assert trajectory.advantages is not None
    role = trained(policy, ALONE)
    role.guard = Guard(GuardConfig(max_in_a_row=3), ALONE.device)
    before = weights(policy)
    broken = trajectory.replace(advantages=trajectory.advantages * torch.nan)
    report = update(role, None, broken, UpdateOptions(1, 2, 400, TEMPERATURE), 0, 0, ALONE)
    assert report["policy/skipped"] == 2
    with pytest.raises(DivergedError, match="3 steps of the policy model in a row"):
        update(role, None, broken, UpdateOptions(1, 2, 400, TEMPERATURE), 0, 1, ALONE)
    assert all(torch.equal(before[name], value) for name, value in weights(policy).items())


# The same gradients on any number of ranks, in any micro-batches.

TEXTS = [[9, 4, 3, 16], [1, 15], [20, 12], [2, 2, 5]]
OPTIONS = UpdateOptions(
    1, 2, 0, TEMPERATURE, PolicyOptions(clip=0.1, dual_clip=1.2, entropy=0.05, kl_coef=0.1), 0.1, pretraining_coef=0.7
)


def recorded() -> Trajectory:
    """As if a policy near the one that learns had made it, so that many ratios and values are clipped."""
    random = np.random.default_rng(3)
    trajectory = Trajectory.of(some_samples(13), "cpu")

    def numbers(centre: float, spread: float) -> Tensor:
        values = random.normal(centre, spread, len(trajectory.tokens))
        return torch.from_numpy(values).float() * trajectory.actions

    near = -float(np.log(LLAMA.vocab_size))
    return trajectory.replace(
        old_logprob=numbers(near, 0.4),
        reference_logprob=numbers(near, 0.4),
        values=numbers(0.0, 0.4),
        advantages=numbers(0.0, 1.0),
        returns=numbers(0.0, 1.0),
    )


def texts(runtime: Runtime) -> list[PackedBatch]:
    """This rank's share of four packs with very different numbers of targets, each filled to one length."""
    packs = [batch([*lengths, 40 - sum(lengths)], seed=index) for index, lengths in enumerate(TEXTS)]
    for pack, lengths in zip(packs, TEXTS, strict=True):
        pack.targets[sum(lengths) :] = -100
    return packs[runtime.rank :: runtime.world]


def whole(tensor: Tensor) -> np.ndarray:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().numpy().copy()


def first_gradients(role: Trained) -> dict[str, np.ndarray]:
    """Filled, when the role takes its first step, with the gradients that its optimizer is given."""
    gradients: dict[str, np.ndarray] = {}
    step = role.optimizer.step

    def look(lr: Tensor, clip_scale: Tensor, should_skip: Tensor) -> None:
        if not gradients:
            gradients.update({name: whole(role.optimizer.gradient(name) * clip_scale) for name in weights(role.model)})
        step(lr, clip_scale, should_skip)

    role.optimizer.step = look  # type: ignore[method-assign]
    return gradients


def updated(capacity: int) -> dict[str, Any]:
    """Gradients of the first steps, statistics of all, and what is read, on however many ranks there are."""
    runtime = start(ParallelConfig())
    policy, critic = (trained(make(config, runtime), runtime) for config in (LLAMA, SCORED))
    trajectory = recorded()
    slices = first_pass(trajectory, 2, capacity, runtime)
    logprob = each_token(trajectory, slices, lambda b: policy.model(b, TEMPERATURE).logprob, runtime)
    found = {"policy": first_gradients(policy), "value": first_gradients(critic)}
    options = dataclasses.replace(OPTIONS, micro_batch_tokens=capacity)
    report = update(policy, critic, trajectory, options, 0, 0, runtime, lambda: texts(runtime))
    return {**found, "report": report, "logprob": logprob.numpy(), "slices": len(slices)}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(updated, 1, 400)[0]


@pytest.mark.parametrize("world, capacity", [(1, 30), (2, 60), (4, 30)])
def test_ranks_and_micro_batches_change_no_gradient(alone: dict[str, Any], world: int, capacity: int) -> None:
    ranks = run_ranks(updated, world, capacity)
    assert all(rank["slices"] == ranks[0]["slices"] for rank in ranks) and ranks[0]["slices"] * world > alone["slices"]
    for rank in ranks:
        for model in ("policy", "value"):
            for name, expected in alone[model].items():
                scale = np.abs(expected).max()
                np.testing.assert_allclose(rank[model][name], expected, rtol=0, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_allclose(rank["logprob"], alone["logprob"], rtol=0, atol=1e-5)
        assert rank["report"] == pytest.approx(alone["report"], rel=1e-3, abs=1e-5)


def test_the_mix_with_texts_is_the_sum_of_two_means(alone: dict[str, Any]) -> None:
    """Against automatic differentiation of the formula, each loss over a denominator of its own."""
    policy = causal_lm(LLAMA)
    trajectory = recorded()
    part = minibatches(trajectory, 2, 0, 0, 0)[0]
    losses = [
        policy_objective(OPTIONS.policy, TEMPERATURE)(policy, own) for own in micro_batches(trajectory, part, 400)
    ]
    read_texts = [next_token_loss()(policy, pack) for pack in texts(ALONE)]
    mean = sum(loss.total for loss in losses) / sum(loss.count for loss in losses)
    of_texts = sum(loss.total for loss in read_texts) / sum(loss.count for loss in read_texts)
    (mean + 0.7 * of_texts).backward()
    assert sum(int(loss.count) for loss in losses) != sum(int(loss.count) for loss in read_texts)
    for name, parameter in policy.named_parameters():
        expected = whole(parameter.grad)  # type: ignore[arg-type]
        np.testing.assert_allclose(alone["policy"][name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert 4 < alone["report"]["ptx/loss"] < 6
    assert 0.1 < alone["report"]["policy/clip_fraction"] < 0.9 and 0.1 < alone["report"]["value/clip_fraction"] < 0.9
