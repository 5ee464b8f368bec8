"""Roles with adapters: one set of weights is policy and reference, and what is frozen stays what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.building import find_trained
from engine.lora import LoraConfig
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.shard import Precision, local
from model.heads import CausalLM
from model.hf import load_config
from rlhf.advantages import gae_advantages, shaped_rewards, whiten
from rlhf.kl import kl_estimate
from rlhf.objectives import PolicyOptions, policy_objective, value_objective
from rlhf.ppo_config import PpoConfig
from rlhf.reward_model import open_reward_model
from rlhf.roles import Frozen, WithoutAdapters
from rlhf.rollout import Rollout
from rlhf.scores import open_scorer
from rlhf.trajectory import Trajectory
from rlhf.update import UpdateOptions, update
from tests.model.test_lora import check_gradients, dense
from tests.ranks import run_ranks
from tests.rlhf.small_ppo import CONTEXT, small_recipe, small_samples, small_tokenizer, write_small_roles
from tests.rlhf.test_roles import Read, make
from tests.rlhf.trajectories import first_pass

RANK = 3
SPEC = LoraConfig(rank=RANK).spec()
assert SPEC is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_roles(tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


def adapted(folder: Path, **changes: Any) -> PpoConfig:
    return small_recipe(folder, lora=LoraConfig(rank=RANK), **changes)


@torch.no_grad()
def teach(model: nn.Module) -> None:
    """Adapters that say something."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("lora_b"):
            values = local(parameter)
            values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(number)) / 20)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: local(p).detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def at_the_start(folder: Path, precision: Precision) -> dict[str, Any]:
    """KL between policy and reference, before and after the policy has learnt; and the base's own log-probabilities."""
    runtime = start(ParallelConfig())
    config, base = adapted(folder), find_trained(str(folder / "sft"), "tools/sft.py")
    roles, read = make(folder, runtime, config, precision), Read(runtime)
    assert isinstance(roles.reference, WithoutAdapters) and roles.reference.model is roles.policy.model
    with Frozen(CausalLM, base.config.with_context(CONTEXT), base, config, precision, runtime).at_work() as alone:
        expected = read.logprob(alone)

    def seen() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            ours = read.logprob(roles.policy.model)
        assert roles.reference is not None
        with roles.at_work(roles.reference) as reference:
            return ours, read.logprob(reference)

    fresh, theirs = seen()
    teach(roles.policy.model)
    learnt, still = seen()
    again, _ = seen()
    return {
        "kl": [kl_estimate(fresh, theirs, kind).abs().max().item() for kind in ("k1", "k2", "k3")],
        "is base": torch.equal(theirs, expected) and torch.equal(still, expected),
        "moved": (learnt - expected).abs().max().item(),
        "comes back": torch.equal(learnt, again),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_reference_is_the_base_to_the_bit_and_fresh_adapters_are_too(
    folder: Path, world: int, precision: Precision
) -> None:
    for rank in run_ranks(at_the_start, world, folder, precision):
        assert rank["kl"] == [0.0] * 3 and rank["is base"] and rank["comes back"]
        assert rank["moved"] > 1e-2


def test_a_reference_of_its_own_is_loaded_where_weights_are_trained_whole_or_another_is_named(
    folder: Path, runtime: Runtime
) -> None:
    words = small_recipe(folder, lora=LoraConfig(rank=RANK, train_embeddings=True))
    named = adapted(folder)
    named.kl = dataclasses.replace(named.kl, reference=str(folder / "sft"))
    for config in (words, named):
        roles, read = make(folder, runtime, config), Read(runtime)
        assert isinstance(roles.reference, Frozen)
        with roles.reference.at_work() as reference:
            assert torch.equal(read.logprob(reference), read.logprob(roles.policy.model))
            assert not any("lora" in name for name, _ in reference.named_parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_critic_begins_with_the_scores_of_the_reward_model_and_trains_adapters_and_head(
    folder: Path, runtime: Runtime, precision: Precision
) -> None:
    config, (tokenizer, template) = adapted(folder), small_tokenizer(folder)
    reward = open_reward_model(folder / "rm", tokenizer, template)
    scorer = open_scorer(config.reward, reward, CONTEXT, 2 * CONTEXT, config, precision, runtime)
    roles, read = make(folder, runtime, config, precision), Read(runtime)
    assert roles.critic is not None and roles.critic_base is not None
    assert roles.critic_base.directory == folder / "rm"
    prompts, samples = small_samples()
    raw, _ = scorer.score(prompts, samples, read.trajectory, runtime)
    assert torch.equal(read.value(roles.critic.model)[read.trajectory.last_token], raw)
    learns = {name for name, p in roles.critic.model.named_parameters() if p.requires_grad}
    assert learns == roles.critic.optimizer.parameters.keys()
    assert {name.rpartition(".")[2] for name in learns - {"score.weight"}} == {"lora_a", "lora_b"}
    assert "score.weight" in learns


def test_without_a_reward_model_values_begin_at_exactly_0_and_move(folder: Path, runtime: Runtime) -> None:
    roles, read = make(folder, runtime, adapted(folder), scored=False), Read(runtime)
    assert roles.critic is not None
    assert not read.value(roles.critic.model).any()
    roles.critic.model(read.slices[0].batch).sum().backward()
    assert roles.critic.optimizer.gradient("score.weight").any()


def sampled(folder: Path, precision: Precision) -> dict[str, Any]:
    """How far the sampler's log-probabilities are from the policy's, and from its base's."""
    runtime = start(ParallelConfig())
    config, (tokenizer, _) = adapted(folder), small_tokenizer(folder)
    roles = make(folder, runtime, config, precision)
    teach(roles.policy.model)
    shape = load_config(folder / "sft", "lm").with_context(CONTEXT)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rollout = Rollout(shape, tokenizer, [2], seed=0, dtype=dtype, context=CONTEXT, lora=SPEC)
    answers = rollout.collect(roles.policy.model, small_samples()[0], 2, 0.7, 12, 0, runtime)
    here = Trajectory.of(answers, runtime.device)
    read = Read(runtime, here)
    with torch.no_grad():
        ours = read.logprob(roles.policy.model)
    assert roles.reference is not None
    with roles.at_work(roles.reference) as reference:
        theirs = read.logprob(reference)
    distance = [(here.sampled_logprob - one)[here.actions].abs().mean().item() for one in (ours, theirs)]
    return {"policy": distance[0], "base": distance[1], "answers": [answer.answer_ids for answer in answers]}


@pytest.mark.parametrize(("world", "precision", "rounding"), [(1, "fp32", 1e-5), (2, "fp32", 1e-5), (2, "bf16", 1e-2)])
def test_answers_are_those_of_merged_weights(folder: Path, world: int, precision: Precision, rounding: float) -> None:
    for rank in run_ranks(sampled, world, folder, precision):
        assert rank["policy"] < rounding < 5 * rounding < rank["base"]


def test_gradients_of_an_update_are_those_of_the_dense_model(folder: Path, runtime: Runtime) -> None:
    """With W' = W + s B A the chain rule gives dA = s B^T dW' and dB = s dW' A^T, part by part."""
    roles, read = make(folder, runtime, adapted(folder)), Read(runtime)
    assert roles.critic is not None and SPEC is not None
    trajectory = read.trajectory.replace(score=torch.linspace(-1, 1, read.trajectory.num_samples))
    for trained in (roles.policy, roles.critic):
        teach(trained.model)
    with torch.no_grad():
        old = read.logprob(roles.policy.model) + 0.1 * torch.sin(torch.arange(len(trajectory.tokens)))
        trajectory = trajectory.replace(old_logprob=old, reference_logprob=old, values=read.value(roles.critic.model))
    trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.0, "k1"))
    advantages, returns = gae_advantages(trajectory, 1.0, 0.95)
    trajectory = trajectory.replace(advantages=whiten(advantages, trajectory.actions), returns=returns)
    judged = Read(runtime, trajectory)
    assert len(judged.slices) > 1
    objectives = (policy_objective(PolicyOptions(entropy=0.01), 0.7), value_objective(0.2))
    for model, objective in zip((roles.policy.model, roles.critic.model), objectives, strict=True):
        whole = dense(model.config, model, SPEC)
        for own in judged.slices:
            for one in (model, whole):
                objective(one, own).total.backward()
        check_gradients(model, whole, SPEC)


def updated(folder: Path, precision: Precision) -> dict[str, Any]:
    """Two iterations' updates: what moved, and what the first steps saw."""
    runtime = start(ParallelConfig())
    roles, read = make(folder, runtime, adapted(folder), precision), Read(runtime)
    assert roles.critic is not None and roles.reference is not None
    trained = (roles.policy, roles.critic)
    before, drift = [frozen(one.model) for one in trained], []
    for _ in range(2):
        trajectory = read.trajectory.replace(score=torch.linspace(-1, 1, read.trajectory.num_samples))
        options = UpdateOptions(2, 1, 2 * CONTEXT, 0.7)
        now = Read(runtime, trajectory)
        now.slices = first_pass(trajectory, 1, 2 * CONTEXT, runtime)
        with torch.no_grad():
            old, values = now.logprob(roles.policy.model), now.value(roles.critic.model)
        with roles.at_work(roles.reference) as reference:
            trajectory = trajectory.replace(old_logprob=old, reference_logprob=now.logprob(reference), values=values)
        trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, 0.05, "k1"))
        advantages, returns = gae_advantages(trajectory, 1.0, 0.95)
        trajectory = trajectory.replace(advantages=whiten(advantages, trajectory.actions), returns=returns)
        report = update(*trained, trajectory, options, 0, 0, runtime)
        drift.append(report["policy/approx_kl_first"])
    return {
        "drift": drift,
        "moved": report["policy/approx_kl"],
        "frozen": [
            all(torch.equal(value, now[name]) for name, value in was.items()) and len(was) > 0
            for was, now in zip(before, (frozen(one.model) for one in trained), strict=True)
        ],
    }


@pytest.mark.parametrize(("world", "precision"), [(1, "fp32"), (2, "bf16")])
def test_first_ratios_are_exactly_one_and_frozen_weights_stay(folder: Path, world: int, precision: Precision) -> None:
    for rank in run_ranks(updated, world, folder, precision):
        assert rank["drift"] == [0.0, 0.0] and rank["moved"] > 0
        assert rank["frozen"] == [True, True]
