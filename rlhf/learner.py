"""The steps of an iteration, one method each: what is sampled, judged, read, estimated and learnt.

A trajectory goes from step to step, and each knows more of it. What a model must compute every rank does for its own
micro-batches, and the sum over ranks is the whole; the rest is plain code on what every rank holds alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from engine.data.loader import PackLoader
from engine.intervals import Z
from engine.masters import Master
from engine.mesh import Runtime
from engine.shard import free_gathered
from rlhf.advantages import gae_advantages, group_advantages, rloo_advantages, shaped_rewards, whiten
from rlhf.kl import KlController, kl_estimate
from rlhf.micro_batches import Slice, each_token, micro_batches, minibatches
from rlhf.objectives import PolicyOptions
from rlhf.ppo_config import PpoConfig
from rlhf.prompts import Prompt, PromptStream
from rlhf.roles import Roles
from rlhf.rollout import Rollout
from rlhf.scores import Scorer
from rlhf.trajectory import Sample, Trajectory
from rlhf.update import UpdateOptions, update

# Held-out answers are drawn alike at every look, and not as those of training at the same place.
_HELD_OUT = 0x5EED


@dataclass(frozen=True)
class Looked:
    """A look at held-out prompts: its numbers, and the answers they are of."""

    row: dict[str, float]
    prompts: Sequence[Prompt]
    samples: Sequence[Sample]
    trajectory: Trajectory
    raw: Tensor


@dataclass
class Learner:
    """Everything that an iteration works on. `begin` comes first.

    config: the resolved recipe.
    held_out: prompts that are looked at and never trained on; the same ones each time.
    fresh_prompts, fresh_texts: make the streams from a cursor (None at the beginning).
    beat: called now and then in what takes long.
    """

    config: PpoConfig
    runtime: Runtime
    roles: Roles
    rollout: Rollout
    scorer: Scorer
    held_out: Sequence[Prompt]
    fresh_prompts: Callable[[dict[str, Any] | None], PromptStream]
    fresh_texts: Callable[[dict[str, Any] | None], PackLoader] | None = None
    beat: Callable[[], None] = lambda: None
    prompts: PromptStream = field(init=False)
    texts: PackLoader | None = field(init=False, default=None)
    kl: KlController = field(init=False)

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """Start, or go on from `numbers()`.

        Raises:
            InputError: prompts or texts are not those of the state.
        """
        kl = self.config.kl
        self.kl = KlController(kl.coef, kl.target, kl.horizon)
        self.prompts = self.fresh_prompts(state and state["prompts"])
        if self.fresh_texts is not None:
            self.texts = self.fresh_texts(state and state["texts"])
        if state is None:
            return
        if kl.target is not None:  # a fixed coefficient is the command's
            self.kl.load(state["kl"])
        self.scorer.load(state["scorer"])
        self.roles.policy.steps = state["policy_steps"]
        if self.roles.critic is not None:
            self.roles.critic.steps = state["critic_steps"]

    def close(self) -> None:
        """Free what works in the background."""
        if self.texts is not None:
            self.texts.close()

    def sample(self, prompts: Sequence[Prompt], samples: int, seed: int | None = None) -> list[Sample]:
        """Answers of the policy as it is."""
        options, policy = self.config.rollout, self.roles.policy
        with self.roles.moments_on_host():
            return self.rollout.collect(
                policy.model,
                prompts,
                samples,
                options.temperature,
                options.max_new_tokens,
                policy.steps,
                self.runtime,
                seed,
                self.beat,
            )

    def score(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> tuple[Trajectory, Tensor]:
        """The answers with their scores, and the scores before clipping and penalties, fp32 [D]."""
        trajectory = Trajectory.of(samples, self.runtime.device)
        raw, final = self.scorer.score(prompts, samples, trajectory, self.runtime)
        return trajectory.replace(score=final), raw

    def read(self, trajectory: Trajectory, iteration: int | None = None) -> Trajectory:
        """Log-probabilities of policy and reference, and values.

        Args:
            iteration: over the very micro-batches that its update begins with; without one, over any.
        """
        slices = self._slices(trajectory, iteration)
        old = trajectory.sampled_logprob
        if self.config.ppo.old_logprobs == "recompute":
            old = self._logprob(self.roles.policy.model, trajectory, slices)
        trajectory = trajectory.replace(old_logprob=old)
        if self.roles.reference is not None:
            with self.roles.at_work(self.roles.reference) as reference:
                trajectory = trajectory.replace(reference_logprob=self._logprob(reference, trajectory, slices))
        if self.roles.critic is not None:
            critic = self.roles.critic.model
            trajectory = trajectory.replace(values=each_token(trajectory, slices, critic, self.runtime))
            free_gathered(critic)
        return trajectory

    def estimate(self, trajectory: Trajectory) -> Trajectory:
        """Rewards and advantages."""
        options, kl = self.config.ppo, self.config.kl
        coef = self.kl.coef if kl.place == "reward" else 0.0
        trajectory = trajectory.replace(rewards=shaped_rewards(trajectory, coef, kl.kind))
        if options.advantage == "group":
            return trajectory.replace(advantages=group_advantages(trajectory, scale=options.whiten))
        if options.advantage == "rloo":
            advantages = rloo_advantages(trajectory)
        else:
            advantages, returns = gae_advantages(trajectory, options.gamma, options.lam, options.truncated)
            trajectory = trajectory.replace(returns=returns)
        if options.whiten:
            advantages = whiten(advantages, trajectory.actions)
        return trajectory.replace(advantages=advantages)

    def update(self, trajectory: Trajectory, iteration: int) -> dict[str, float]:
        """Take the steps, and the KL coefficient's for this iteration; what they saw.

        Raises:
            DivergedError: a guard has refused too many steps.
        """
        config, kl = self.config, self.config.kl
        is_warming_up = self.roles.critic is not None and iteration < config.value.warmup
        coef = self.kl.coef
        options = UpdateOptions(
            epochs=config.ppo.epochs,
            minibatches=config.ppo.minibatches,
            micro_batch_tokens=self._capacity,
            temperature=config.rollout.temperature,
            policy=PolicyOptions(
                clip=config.ppo.clip,
                clip_high=config.ppo.clip_high,
                dual_clip=config.ppo.dual_clip,
                entropy=config.ppo.entropy,
                kl_coef=coef if kl.place == "loss" else 0.0,
                kl=kl.kind,
            ),
            value_clip=config.value.clip,
            pretraining_coef=config.ptx.coef,
        )
        report = update(
            None if is_warming_up else self.roles.policy,
            self.roles.critic,
            trajectory,
            options,
            config.seed,
            iteration,
            self.runtime,
            None if self.texts is None else self.texts.next_step,
            self.beat,
        )
        if trajectory.reference_logprob is not None:
            assert trajectory.old_logprob is not None
            report["objective/kl_coef"] = coef
            if not is_warming_up:
                divergence = kl_estimate(trajectory.old_logprob, trajectory.reference_logprob, kl.kind)
                self.kl.update(trajectory.sum_by_sample(divergence).mean().item(), trajectory.num_samples)
        return {"loss": report.get("policy/loss", 0.0), **report}

    def look(self, prompts: Sequence[Prompt]) -> Looked:
        """Answers to held-out prompts: means with the half width of a 95% interval. Changes nothing."""
        state = self.scorer.state()
        samples = self.sample(prompts, 1, seed=self.config.seed ^ _HELD_OUT)
        trajectory, raw = self.score(prompts, samples)
        self.scorer.load(state)
        trajectory = self.read(trajectory)
        lengths = trajectory.sum_by_sample(trajectory.actions.float())
        of = {"reward": raw, "length": lengths, "truncated": 1 - trajectory.ended.float()}
        if trajectory.reference_logprob is not None:
            assert trajectory.old_logprob is not None
            of["kl"] = trajectory.sum_by_sample(trajectory.old_logprob - trajectory.reference_logprob)
        row = {}
        for name, values in of.items():
            row[f"held_out/{name}"] = values.mean().item()
            row[f"held_out/{name}_interval"] = Z * values.std(correction=0).item() / math.sqrt(len(values))
        return Looked(row, prompts, samples, trajectory, raw)

    def _slices(self, trajectory: Trajectory, iteration: int | None) -> list[Slice]:
        parts = [np.arange(trajectory.num_samples)]
        if iteration is not None:
            parts = minibatches(trajectory, self.config.ppo.minibatches, self.config.seed, iteration, epoch=0)
        rank, world = self.runtime.rank, self.runtime.world
        return [own for part in parts for own in micro_batches(trajectory, part, self._capacity, rank, world)]

    def _logprob(self, model: nn.Module, trajectory: Trajectory, slices: Sequence[Slice]) -> Tensor:
        temperature = self.config.rollout.temperature
        logprob = each_token(trajectory, slices, lambda batch: model(batch, temperature).logprob, self.runtime)
        free_gathered(model)
        return logprob

    @property
    def _capacity(self) -> int:
        assert self.config.train.micro_batch_tokens is not None
        return self.config.train.micro_batch_tokens

    def tensors(self) -> dict[str, Tensor | Master]:
        """All state that is tensors, by name; loading fills them in place. Frozen weights are no state."""
        named: dict[str, Tensor | Master] = {}
        for role, trained in (("policy", self.roles.policy), ("critic", self.roles.critic)):
            if trained is not None:
                own = {f"model.{name}": master for name, master in trained.optimizer.masters()}
                own |= {**dict(trained.optimizer.state()), "guard.state": trained.guard.state}
                named |= {f"{role}.{name}": tensor for name, tensor in own.items()}
        return named

    def numbers(self) -> dict[str, Any]:
        """All other state, fit for JSON."""
        critic = self.roles.critic
        return {
            "prompts": self.prompts.cursor,
            "texts": self.texts and self.texts.cursor,
            "kl": self.kl.state(),
            "scorer": self.scorer.state(),
            "policy_steps": self.roles.policy.steps,
            "critic_steps": 0 if critic is None else critic.steps,
        }
