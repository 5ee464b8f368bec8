"""The update: a few passes over a trajectory, a step of critic and policy for each minibatch.

    epochs x minibatches steps, each over token-balanced micro-batches of all ranks

Critic and policy share nothing but the trajectory, so the one takes all of its steps before the other begins: only one
model's gradients and activations are alive, and what the other holds may wait elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.guard import Guard
from engine.launch import DivergedError
from engine.mesh import Runtime
from engine.optim import AdamW
from engine.step import M, Objective, PendingReport, count_targets, train_step
from model.batch import PackedBatch
from rlhf.micro_batches import Slice, micro_batches, minibatches
from rlhf.objectives import (
    PolicyOptions,
    policy_objective,
    policy_statistics,
    value_objective,
    value_statistics,
    with_pretraining,
)
from rlhf.trajectory import Trajectory


@dataclass
class Trained:
    """A model that learns: policy or critic, each with an optimizer, a guard and a learning rate of its own.

    steps: behind it; lr: the rate of a step, by its number.
    """

    model: nn.Module
    optimizer: AdamW
    guard: Guard
    lr: Callable[[int], float]
    steps: int = 0

    def step(self, objective: Objective[M], batches: Sequence[M], runtime: Runtime) -> PendingReport:
        """One optimizer step."""
        rate = self.lr(self.steps)
        self.steps += 1
        return train_step(self.model, self.optimizer, self.guard, objective, batches, runtime, lr=rate)


@dataclass(frozen=True)
class UpdateOptions:
    """How a trajectory is learnt from.

    epochs: passes over it; minibatches: steps a pass.
    micro_batch_tokens: of one forward pass, at most.
    temperature: of sampling, and of every log-probability.
    value_clip: see `value_objective`.
    pretraining_coef: weight of texts beside the policy's loss (PPO-ptx).
    """

    epochs: int
    minibatches: int
    micro_batch_tokens: int
    temperature: float = 1.0
    policy: PolicyOptions = field(default_factory=PolicyOptions)
    value_clip: float = 0.2
    pretraining_coef: float = 0.0


def update(
    policy: Trained | None,
    critic: Trained | None,
    trajectory: Trajectory,
    options: UpdateOptions,
    seed: int,
    iteration: int,
    runtime: Runtime,
    pretraining: Callable[[], Sequence[PackedBatch]] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Improve the policy and its critic, in place, by exactly epochs x minibatches steps each.

    Args:
        policy, critic: None where there is none, or where it does not learn in this iteration.
        trajectory: with what the objectives read.
        seed, iteration: decide which samples are in which minibatch.
        pretraining: texts for each step of the policy, with `pretraining_coef`: this rank's packs, as many and as
            large on every rank.
        beat: called before every step, to tell whoever watches that the work goes on.
    Returns:
        means over the update's actions of what each step saw before it moved: policy/*, value/*, ptx/loss.
    Raises:
        DivergedError: a guard has refused too many steps; on every rank.
    """

    def shares() -> Iterator[list[Slice]]:
        for epoch in range(options.epochs):
            for samples in minibatches(trajectory, options.minibatches, seed, iteration, epoch):
                beat()
                yield micro_batches(trajectory, samples, options.micro_batch_tokens, runtime.rank, runtime.world)

    report: dict[str, float] = {}
    if critic is not None:
        judge = value_objective(options.value_clip)
        steps = [critic.step(judge, slices, runtime) for slices in shares()]
        report |= _summary("value", critic, steps, value_statistics)
    if policy is not None:
        improve = policy_objective(options.policy, options.temperature)
        steps = []
        for slices in shares():
            texts = [batch.to(runtime.device) for batch in pretraining()] if pretraining else []
            objective: Objective[Any] = improve
            if texts:
                objective = _beside(texts, slices, improve, options.pretraining_coef, runtime)
            batches: list[Any] = [*slices, *texts]
            steps.append(policy.step(objective, batches, runtime))
        report |= _summary("policy", policy, steps, policy_statistics)
    return report


def _beside(
    texts: Sequence[PackedBatch], slices: Sequence[Slice], improve: Objective[Slice], coef: float, runtime: Runtime
) -> Objective[Any]:
    """The policy's objective with that of a step's texts."""
    actions = torch.stack([own.actions.sum() for own in slices]).sum().float()
    targets = torch.stack([count_targets(batch) for batch in texts]).sum()
    actions, targets = runtime.sum(torch.stack([actions, targets])).unbind()
    return with_pretraining(improve, coef, actions / targets.clamp(min=1))


def _summary(
    name: str,
    trained: Trained,
    steps: Sequence[PendingReport],
    statistics: Callable[[Sequence[float]], dict[str, float]],
) -> dict[str, float]:
    """Means over the steps, weighted by their actions; of the first one, how far the policy was from the old one.

    Raises:
        DivergedError: the guard has given up.
    """
    reports = [step.read() for step in steps]
    for report in reports:
        if trained.guard.has_given_up(report.skipped, report.skipped_in_a_row):
            raise DivergedError(
                f"Diverged: {report.skipped_in_a_row} steps of the {name} model in a row were refused, "
                f"{report.skipped} in all (last loss {report.loss:.4g}, gradient norm {report.grad_norm:.4g}). Lower "
                "its learning rate or raise --kl.coef; if the leap is meant, raise --guard.loss_leap or "
                "--guard.norm_leap. The last checkpoint is intact."
            )
    weights = np.array([report.targets for report in reports])
    rows = [statistics(report.shown) for report in reports]
    means = {key: float(np.average([row[key] for row in rows], weights=weights)) for key in rows[0]}
    first = {f"{key}_first": value for key, value in rows[0].items() if key == "policy/approx_kl"}
    return {
        **means,
        **first,
        f"{name}/grad_norm": float(np.mean([report.grad_norm for report in reports])),
        f"{name}/lr": trained.lr(trained.steps - 1),
        f"{name}/skipped": float(sum(report.was_skipped for report in reports)),
    }
