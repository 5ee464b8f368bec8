"""The models of alignment, each sharded over all ranks: policy and critic learn, reference and reward are frozen.

A frozen model stores what the policy computes with: its weights rounded to the compute dtype, a quarter of the memory
that a model in training takes for its weights and moments. So a reference that is a copy of the policy agrees with it
to the bit, and their divergence begins at exactly 0.

Where adapters are trained the policy holds its reference: it reads with the adapters off. The critic has adapters and a
head of its own beside frozen weights of its own, as it begins as the reward model, whatever size that has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.building import Base, fill_from_base, find_trained
from engine.guard import Guard
from engine.job import STORED, JobConfig, make_model
from engine.mesh import Runtime
from engine.offload import Parking
from engine.optim import AdamW, OptimConfig
from engine.schedule import learning_rate
from engine.shard import Precision, free_gathered, local, parallelize
from model.batch import PackedBatch
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.errors import InputError
from model.heads import CausalLM, ScalarModel
from model.lora import adapters_off
from model.tokenizer import Tokenizer, has_tokenizer
from rlhf.ppo_config import PpoConfig
from rlhf.reward_model import RewardModel, open_reward_model, require_rows
from rlhf.update import Trained


class NormalisedScore(ScalarModel):
    """(raw - mean) / deviation, with those that a reward model's configuration holds: what scores are measured in.

    A critic that begins as a reward model is one too, so its values are in the units of the score from the first.
    """

    def forward(self, batch: PackedBatch) -> Tensor:
        """fp32 [T]"""
        mean, std = self.config.score_mean, self.config.score_std
        return (super().forward(batch) - (0.0 if mean is None else mean)) / (1.0 if std is None else std)


class Frozen:
    """A model that only judges, without gradients.

    Args:
        root, config, base: the model's class, its configuration, and where its weights are.
        job: how it is sharded and compiled: as the models in training.
        offload: its weights wait in host memory while it is not at work.
    """

    def __init__(
        self,
        root: type[nn.Module],
        config: ModelConfig,
        base: Base,
        job: JobConfig,
        precision: Precision,
        runtime: Runtime,
        offload: bool = False,
    ) -> None:
        with torch.device("meta"):
            self.model: Any = root(config)
        self.model.to(STORED[precision]).requires_grad_(False)
        if isinstance(self.model, ScalarModel):
            self.model.score.float()
        parallel = replace(job.parallel, reshard_after_forward=True)
        parallelize(self.model, runtime, parallel, precision, "none", job.train.compile)
        fill_from_base(self.model, config, base, job.seed, runtime)
        self._parking = Parking(self.model.parameters) if offload else None
        if self._parking is not None:
            self._parking.leave()

    @contextmanager
    def at_work(self) -> Iterator[nn.Module]:
        """The model, on its device; afterwards nothing of it stays gathered."""
        if self._parking is not None:
            self._parking.come_back()
        try:
            with torch.no_grad():
                yield self.model
        finally:
            free_gathered(self.model)
            if self._parking is not None:
                self._parking.leave()


class WithoutAdapters:
    """The frozen weights of a model in training, as a reference: nothing is loaded, and nothing is held."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @contextmanager
    def at_work(self) -> Iterator[nn.Module]:
        """The model with its adapters off; afterwards nothing of it stays gathered."""
        try:
            with torch.no_grad(), adapters_off(self.model):
                yield self.model
        finally:
            free_gathered(self.model)


@dataclass(frozen=True)
class Roles:
    """Who is there. The reward model belongs to the scorer (`rlhf.scores`).

    critic: None where advantages need no values.
    reference: None where nothing pulls to it.
    critic_base: what the critic began as.
    """

    policy: Trained
    critic: Trained | None
    reference: Frozen | WithoutAdapters | None
    moments: Parking | None = None
    critic_base: Base | None = None

    def at_work(self, role: Frozen | WithoutAdapters) -> Any:
        """A context with a frozen role's model, on its device."""
        return role.at_work()

    def moments_on_host(self) -> Any:
        """A context in which the optimizer moments of policy and critic are in host memory, where that was asked for;
        on a CPU nothing happens."""
        return nullcontext() if self.moments is None else self.moments.away()


def make_roles(
    config: PpoConfig,
    base: Base,
    model: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    reward: RewardModel | None,
    precision: Precision,
    runtime: Runtime,
) -> Roles:
    """Build policy, critic and reference.

    Args:
        config: the resolved recipe.
        base, model: of the policy; its configuration with the run's context.
        reward: what the critic begins as, unless `value.model` says otherwise; None where scores are a function's.
    Raises:
        InputError: a reference or critic with another tokenizer or template, too short a context, or no whole model.
    """
    assert config.train.steps is not None and config.optim.lr is not None
    steps = config.ppo.epochs * config.ppo.minibatches
    is_on_gpu = runtime.device.type == "cuda"
    has_critic = config.ppo.advantage == "gae"

    reference: Frozen | WithoutAdapters | None = None
    if config.kl.coef > 0 and not config.reference_is_policy:
        other = base
        if config.kl.reference is not None:
            other = find_trained(config.kl.reference, "tools/sft.py", option="--kl.reference")
            _check_ids(other, tokenizer, model, "--kl.reference")
        shape = other.config.with_context(model.rope_length)
        offload = config.kl.offload and is_on_gpu
        reference = Frozen(CausalLM, shape, other, config, precision, runtime, offload)
    warmup = config.value.warmup if has_critic else 0
    policy = _trained(
        make_model(CausalLM, model, config, base, precision, runtime),
        config,
        config.optim,
        max(1, config.train.steps - warmup) * steps,
        runtime,
    )
    if config.reference_is_policy:
        reference = WithoutAdapters(policy.model)
    critic, critic_base = None, None
    if has_critic:
        critic_base = _critic_base(config, base, model, tokenizer, template, reward)
        critic = _trained(
            _make_critic(config, critic_base, model, precision, runtime),
            config,
            replace(config.optim, lr=config.value.lr),
            config.train.steps * steps,
            runtime,
        )
    moments = None
    if config.rollout.offload_moments and is_on_gpu:
        moments = Parking(lambda: moments_of(policy, critic))
    return Roles(policy, critic, reference, moments, critic_base)


def moments_of(*trained: Trained | None) -> Iterator[Tensor]:
    """All optimizer moments."""
    for one in trained:
        if one is not None:
            yield from one.optimizer.exp_avg.values()
            yield from one.optimizer.exp_avg_sq.values()


def _trained(model: nn.Module, config: PpoConfig, optim: OptimConfig, steps: int, runtime: Runtime) -> Trained:
    assert optim.lr is not None
    rate = functools.partial(learning_rate, steps=steps, peak=optim.lr, config=config.schedule)
    return Trained(model, AdamW(model, optim), Guard(config.guard, runtime.device), rate)


def _critic_base(
    config: PpoConfig,
    base: Base,
    model: ModelConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    reward: RewardModel | None,
) -> Base:
    """The reward model, in whatever size it has; else a language model."""
    if config.value.model is not None:
        found = find_trained(config.value.model, "tools/rm.py", None, option="--value.model")
        if found.config.head == "lm":
            _check_ids(found, tokenizer, model, "--value.model")
            return found
        reward = open_reward_model(config.value.model, tokenizer, template, model.vocab_size)
    return base if reward is None else Base(reward.config, reward.directory)


def _make_critic(
    config: PpoConfig, base: Base, model: ModelConfig, precision: Precision, runtime: Runtime
) -> nn.Module:
    """With the head of the reward model that it begins as; as a language model with a head of zeros: V is 0."""
    shape = dataclasses.replace(base.config.with_context(model.rope_length), head="score")
    critic = make_model(NormalisedScore, shape, config, base, precision, runtime)
    if base.config.head == "lm":
        with torch.no_grad():
            local(critic.score.weight).zero_()
    return critic


def _check_ids(base: Base, tokenizer: Tokenizer, policy: ModelConfig, option: str) -> None:
    """
    Raises:
        InputError: the model reads with another tokenizer, or does not reach all ids of the policy.
    """
    assert base.directory is not None
    require_rows(base.config, policy.vocab_size, f"{option} {base.directory}")
    if has_tokenizer(base.directory) and Tokenizer.load(base.directory).fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{option} {base.directory} reads with another tokenizer than the policy; its ids would mean other words. "
            "Give a model that was trained from the same base."
        )
