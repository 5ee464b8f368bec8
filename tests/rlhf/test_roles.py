"""Roles: a reference that agrees with its policy to the bit, a critic in the units of the score, and their memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.building import find_trained
from engine.masters import masters
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.offload import Parking
from engine.shard import Precision, local
from model.config import parameter_shapes
from model.errors import InputError
from model.heads import CausalLM
from model.hf import load_config, write_model
from model.init import initial_value
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_sentencepiece
from rlhf.kl import kl_estimate
from rlhf.micro_batches import each_token, micro_batches
from rlhf.ppo_config import PpoConfig
from rlhf.reward_model import open_reward_model
from rlhf.roles import Frozen, Roles, make_roles, moments_of
from rlhf.scores import open_scorer
from rlhf.trajectory import Trajectory
from tests.ranks import run_ranks
from tests.rlhf.small_ppo import CONTEXT, small_recipe, small_samples, small_tokenizer, write_small_roles
from tests.small_base import small_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_roles(tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


def make(
    folder: Path, runtime: Runtime, config: PpoConfig | None = None, precision: Precision = "fp32", scored: bool = True
) -> Roles:
    config, (tokenizer, template) = config or small_recipe(folder), small_tokenizer(folder)
    base = find_trained(config.model, "tools/sft.py")
    reward = open_reward_model(folder / "rm", tokenizer, template) if scored else None
    shape = base.config.with_context(CONTEXT)
    return make_roles(config, base, shape, tokenizer, template, reward, precision, runtime)


class Read:
    """What models say of small samples, over the micro-batches of a rank."""

    def __init__(self, runtime: Runtime, trajectory: Trajectory | None = None) -> None:
        self.runtime = runtime
        self.trajectory = Trajectory.of(small_samples()[1], runtime.device) if trajectory is None else trajectory
        everybody = np.arange(self.trajectory.num_samples)
        self.slices = micro_batches(self.trajectory, everybody, 2 * CONTEXT, runtime.rank, runtime.world)

    def logprob(self, model: nn.Module) -> Tensor:
        return each_token(self.trajectory, self.slices, lambda batch: model(batch, 0.7).logprob, self.runtime)

    def value(self, model: nn.Module) -> Tensor:
        return each_token(self.trajectory, self.slices, model, self.runtime)


def at_the_start(folder: Path, precision: Precision) -> dict[str, Any]:
    """KL between policy and reference before any step, what the reference holds, and gathered modules afterwards."""
    runtime = start(ParallelConfig())
    roles, read = make(folder, runtime, precision=precision), Read(runtime)
    assert roles.reference is not None
    with roles.at_work(roles.reference) as reference:
        theirs = read.logprob(reference)
    ours = read.logprob(roles.policy.model)
    for parameter in roles.reference.model.parameters():
        assert parameter.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert not parameter.requires_grad and parameter.grad is None
    return {
        "kl": [kl_estimate(ours, theirs, kind).abs().max().item() for kind in ("k1", "k2", "k3")],
        "logprob": ours.numpy(),
        "held": sum(local(p).untyped_storage().nbytes() for p in roles.reference.model.parameters()),
        "is_sharded": all(isinstance(p, DTensor) for p in roles.reference.model.parameters()),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2])
def test_policy_and_reference_agree_to_the_bit_before_the_first_step(
    folder: Path, world: int, precision: Precision
) -> None:
    found = run_ranks(at_the_start, world, folder, precision)
    parameters = load_config(folder / "sft", "lm").num_parameters
    for rank in found:
        assert rank["kl"] == [0.0] * 3
        assert rank["is_sharded"] == (world > 1)
        # Nothing but the shard is left: odd sizes are padded, by a row of each of the 24 tensors at most.
        width = 2 if precision == "bf16" else 4
        assert rank["held"] <= width * (parameters / world + 24 * 48)
    assert np.abs(found[0]["logprob"]).max() > 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_they_part_with_the_first_step_and_the_reference_stays(
    folder: Path, runtime: Runtime, precision: Precision
) -> None:
    roles, read = make(folder, runtime, precision=precision), Read(runtime)
    assert roles.reference is not None
    with roles.reference.at_work() as reference:
        before = read.logprob(reference)
    with torch.no_grad():
        for parameter in roles.policy.model.parameters():
            parameter.mul_(1.01)
    with roles.reference.at_work() as reference:
        assert torch.equal(read.logprob(reference), before)
    assert (read.logprob(roles.policy.model) - before).abs().max() > 1e-3


def test_no_reference_is_loaded_where_nothing_pulls_to_it(folder: Path, runtime: Runtime) -> None:
    config = small_recipe(folder)
    config.kl = dataclasses.replace(config.kl, coef=0.0, reference="/no/such/directory")
    assert make(folder, runtime, config).reference is None


def test_dropout_and_modes_change_nothing(folder: Path, runtime: Runtime) -> None:
    roles, read = make(folder, runtime), Read(runtime)
    assert roles.critic is not None
    for model, of in ((roles.policy.model, read.logprob), (roles.critic.model, read.value)):
        assert torch.equal(of(model.train()), of(model.eval()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_critic_begins_with_the_scores_of_the_reward_model(
    folder: Path, runtime: Runtime, precision: Precision
) -> None:
    config, (tokenizer, template) = small_recipe(folder), small_tokenizer(folder)
    reward = open_reward_model(folder / "rm", tokenizer, template)
    scorer = open_scorer(config.reward, reward, CONTEXT, 2 * CONTEXT, config, precision, runtime)
    roles, read = make(folder, runtime, precision=precision), Read(runtime)
    assert roles.critic is not None
    assert roles.critic.model.config.hidden_size > roles.policy.model.config.hidden_size
    assert all(parameter.requires_grad for parameter in roles.critic.model.parameters())
    assert all(one.dtype == torch.float32 for _, one in masters(roles.critic.model.named_parameters()))
    prompts, samples = small_samples()
    raw, _ = scorer.score(prompts, samples, read.trajectory, runtime)
    assert torch.equal(read.value(roles.critic.model)[read.trajectory.last_token], raw)


def test_without_a_reward_model_values_begin_at_exactly_0_and_move(folder: Path, runtime: Runtime) -> None:
    roles, read = make(folder, runtime, scored=False), Read(runtime)
    assert roles.critic is not None
    assert not read.value(roles.critic.model).any()
    trunks = zip(roles.critic.model.model.parameters(), roles.policy.model.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in trunks)
    roles.critic.model(read.slices[0].batch).sum().backward()
    assert roles.critic.optimizer.gradient("score.weight").any()


@pytest.mark.parametrize("value", ["sft", "rm"])
def test_a_critic_may_begin_as_any_model_of_the_tokenizer(folder: Path, runtime: Runtime, value: str) -> None:
    config = small_recipe(folder)
    config.value = dataclasses.replace(config.value, model=str(folder / value))
    roles, read = make(folder, runtime, config, scored=value == "sft"), Read(runtime)
    assert roles.critic is not None
    values = read.value(roles.critic.model)
    assert values.any() == (value == "rm")


@pytest.mark.parametrize("advantage", ["group", "rloo"])
def test_there_is_no_critic_where_answers_are_compared(folder: Path, runtime: Runtime, advantage: Any) -> None:
    config = small_recipe(folder)
    config.ppo = dataclasses.replace(config.ppo, advantage=advantage)
    assert make(folder, runtime, config).critic is None


def test_rates_fall_over_the_steps_that_each_model_takes(folder: Path, runtime: Runtime) -> None:
    config = small_recipe(folder)
    config.train = dataclasses.replace(config.train, steps=10)
    config.value = dataclasses.replace(config.value, warmup=4, lr=3e-3)
    config.optim = dataclasses.replace(config.optim, lr=1e-3)
    config.ppo = dataclasses.replace(config.ppo, epochs=2, minibatches=3)
    roles = make(folder, runtime, config)
    assert roles.critic is not None
    for one, peak, steps in ((roles.policy, 1e-3, 6 * 2 * 3), (roles.critic, 3e-3, 10 * 2 * 3)):
        assert [one.lr(step) for step in range(steps)] == pytest.approx(
            [peak * (1 - at / steps) for at in range(steps)]
        )
        assert one.steps == 0 and one.optimizer.config.eps == config.optim.eps
    assert roles.policy.optimizer is not roles.critic.optimizer


# Refusals


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Path:
    """A policy's copy that reads with another tokenizer."""
    other = folder / "stranger"
    config = load_config(folder / "sft", "lm")
    weights = ((name, initial_value(config, name, shape, 1)) for name, shape in parameter_shapes(config).items())
    write_model(other, config, weights, torch.float32)
    Tokenizer.from_sentencepiece(train_sentencepiece(small_texts(100), 390, is_limit_soft=True), {}).save(other)
    return other


def test_a_reference_or_critic_with_another_tokenizer_is_refused(
    folder: Path, stranger: Path, runtime: Runtime
) -> None:
    for group, name in (("kl", "reference"), ("value", "model")):
        config = small_recipe(folder)
        setattr(config, group, dataclasses.replace(getattr(config, group), **{name: str(stranger)}))
        with pytest.raises(InputError, match=rf"--{group}.{name} \S*stranger reads with another tokenizer"):
            make(folder, runtime, config)


def test_a_model_that_lacks_rows_of_the_policy_is_refused(folder: Path, runtime: Runtime) -> None:
    """The same tokenizer, but a policy padded to more rows: an id there would be read past the end of a table."""
    tokenizer, template = small_tokenizer(folder)
    rows = load_config(folder / "rm", "score").vocab_size
    with pytest.raises(InputError, match=rf"rm has {rows} rows for ids, the policy {rows + 1}"):
        open_reward_model(folder / "rm", tokenizer, template, rows + 1)
    assert open_reward_model(folder / "rm", tokenizer, template, rows).config.vocab_size == rows

    config = small_recipe(folder)
    config.kl = dataclasses.replace(config.kl, reference=str(folder / "sft"))
    base = find_trained(config.model, "tools/sft.py")
    policy = dataclasses.replace(base.config.with_context(CONTEXT), vocab_size=rows + 1)
    with pytest.raises(InputError, match=rf"--kl.reference \S*sft has {rows} rows for ids, the policy {rows + 1}"):
        make_roles(config, base, policy, tokenizer, template, None, "fp32", runtime)


def test_a_reference_that_does_not_exist_is_refused(folder: Path, runtime: Runtime) -> None:
    config = small_recipe(folder)
    config.kl = dataclasses.replace(config.kl, reference=str(folder / "nothing"))
    with pytest.raises(InputError, match=r"--kl.reference \S*nothing: no such directory"):
        make(folder, runtime, config)


# Memory


def offloaded(folder: Path, precision: Precision) -> bool:
    """Whether a frozen model's weights are away whenever it is not at work, and it judges as one that stays."""
    runtime = start(ParallelConfig())
    config, read = small_recipe(folder), Read(runtime)
    base = find_trained(config.model, "tools/sft.py")
    stays, waits = (
        Frozen(CausalLM, base.config, base, config, precision, runtime, is_away) for is_away in (False, True)
    )
    with stays.at_work() as model:
        expected = read.logprob(model)
    for _ in range(3):
        assert sum(local(p).untyped_storage().nbytes() for p in waits.model.parameters()) == 0
        with waits.at_work() as model:
            assert torch.equal(read.logprob(model), expected)
    return True


@pytest.mark.parametrize(("world", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_an_offloaded_role_holds_memory_only_while_it_is_at_work(
    folder: Path, world: int, precision: Precision
) -> None:
    assert run_ranks(offloaded, world, folder, precision) == [True] * world


def test_moments_are_those_of_policy_and_critic_and_stay_on_a_cpu(folder: Path, runtime: Runtime) -> None:
    config = small_recipe(folder)
    config.rollout = dataclasses.replace(config.rollout, offload_moments=True)
    roles = make(folder, runtime, config)
    assert roles.critic is not None
    moments = list(moments_of(roles.policy, roles.critic))
    expected = [
        one.numel() for role in (roles.policy, roles.critic) for _ in range(2) for one in role.model.parameters()
    ]
    assert sorted(moment.numel() for moment in moments) == sorted(expected)
    with roles.moments_on_host():
        assert all(moment.untyped_storage().nbytes() for moment in moments)
    # As on a GPU.
    with dataclasses.replace(roles, moments=Parking(lambda: moments_of(roles.policy, roles.critic))).moments_on_host():
        assert not any(moment.untyped_storage().nbytes() for moment in moments)
    assert not any(moment.any() for moment in moments)
