"""On a GPU, too, the host never waits inside a step; `tests/engine/test_host_waits.py` says what that means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime
from engine.neftune import neftune
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import Precision, fill, parallelize
from engine.step import Objective, PendingReport, next_token_loss, train_step
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.init import initial_value
from rlhf import update as update_module
from rlhf.dpo import DpoLossConfig, dpo_objective
from rlhf.objectives import PolicyOptions
from rlhf.reward_model import ranking_objective
from rlhf.trajectory import Trajectory
from rlhf.update import Trained, UpdateOptions, update
from tests.gpu.test_training_step import random_pack
from tests.gpu.test_training_step import runtime as runtime
from tests.model.tiny import LLAMA
from tests.no_values import pinned
from tests.rlhf.ranked_groups import ranked_groups
from tests.rlhf.trajectories import SCORED, some_samples

pytestmark = pytest.mark.gpu


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def make(
    root: type[nn.Module],
    config: ModelConfig,
    runtime: Runtime,
    precision: Precision = "bf16",
    recompute: Recompute = "none",
) -> tuple[nn.Module, AdamW, Guard]:
    with torch.device("meta"):
        model = root(config)
    parallelize(model, runtime, ParallelConfig(), precision, recompute)
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shapes[name], 0, runtime.device)) for name in shapes))
    return model, AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device)


def losses_without_waits(
    trained: tuple[nn.Module, AdamW, Guard], objective: Objective, batches: Sequence[Any], runtime: Runtime
) -> list[float]:
    """Of three steps that are not waited for, after two that fill tables."""

    def step() -> PendingReport:
        return train_step(*trained, objective, batches, runtime, lr=1e-3, busy_seconds=0.1)

    for _ in range(2):
        step().read()
    with no_waits():
        reports = [step() for _ in range(3)]
    return [report.read().loss for report in reports]  # this waits, and is meant to


@pytest.mark.parametrize("alpha", [0.0, 5.0], ids=["plain", "noise"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_never_waits_for_the_device(
    runtime: Runtime, precision: Precision, recompute: Recompute, alpha: float
) -> None:
    config = PRESETS["tiny"]
    packs = [pinned(random_pack(config, 1024, 256, seed)) for seed in range(2)]
    noise = neftune(alpha, config.hidden_size, 0, torch.float32) if alpha else None
    trained = make(CausalLM, config, runtime, precision, recompute)
    losses = losses_without_waits(trained, next_token_loss(1e-4, noise), packs, runtime)
    assert losses[-1] < losses[0]


def test_steps_of_a_reward_model_and_of_dpo_never_wait(runtime: Runtime) -> None:
    batches = [pinned(ranked_groups([[2, 1, 0], [1, 0], [3, 3, 1]])) for _ in range(2)]
    ranking = ranking_objective("pairwise", margin=0.1, centre=0.01)
    losses_without_waits(make(ScalarModel, SCORED, runtime), ranking, batches, runtime)
    preference = dpo_objective(DpoLossConfig(), torch.zeros(8, device=runtime.device))
    losses_without_waits(make(CausalLM, LLAMA, runtime), preference, batches, runtime)


def test_an_update_of_policy_and_critic_never_waits_between_its_steps(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_module, "_summary", lambda *_: {})  # it reads the reports
    trajectory = Trajectory.of(some_samples(), runtime.device)
    numbers = {name: torch.zeros_like(trajectory.sampled_logprob) for name in ("values", "returns", "advantages")}
    trajectory = dataclasses.replace(trajectory, old_logprob=trajectory.sampled_logprob, **numbers)
    policy = Trained(*make(CausalLM, LLAMA, runtime), lr=lambda _: 1e-3)
    critic = Trained(*make(ScalarModel, SCORED, runtime), lr=lambda _: 1e-3)
    options = UpdateOptions(epochs=2, minibatches=2, micro_batch_tokens=48, policy=PolicyOptions(entropy=0.01))
    update(policy, critic, trajectory, options, 0, 0, runtime)  # it asks once what is in the trajectory
    with no_waits():
        update(policy, critic, trajectory, options, 0, 1, runtime)
    assert policy.steps == critic.steps == 8
