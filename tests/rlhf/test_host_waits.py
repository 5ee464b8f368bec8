"""Steps of reward models, DPO and PPO never wait for the device: see `tests.no_values`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from engine.data.ranked_batch import RankedBatch
from engine.step import Objective, PendingReport
from model.heads import CausalLM, ScalarModel
from rlhf import update as update_module
from rlhf.dpo import DpoLossConfig, dpo_objective
from rlhf.objectives import PolicyOptions
from rlhf.ranking_loss import RankingLoss
from rlhf.reward_model import ranking_objective
from rlhf.trajectory import Trajectory
from rlhf.update import Trained, UpdateOptions, update
from tests.engine.test_host_waits import packs
from tests.model.tiny import LLAMA
from tests.no_values import DEVICE, NOWHERE, HostWaits, make, pinned, step, watched
from tests.rlhf.ranked_groups import ranked_groups
from tests.rlhf.trajectories import SCORED, some_samples


def comparisons() -> list[RankedBatch]:
    return [pinned(ranked_groups([[2, 1, 0], [1, 0], [3, 3, 1]])) for _ in range(2)]


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce", "best"])
def test_a_step_of_a_reward_model_never_waits(kind: RankingLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as watch:
        trained, objective = make(ScalarModel, SCORED), ranking_objective(kind, margin=0.1, centre=0.01)
        step(trained, objective, comparisons())
        with watch():
            step(trained, objective, comparisons())


@pytest.mark.parametrize(
    "config",
    [
        DpoLossConfig(label_smoothing=0.1, per_token=True),
        DpoLossConfig(loss="plackett_luce"),
        DpoLossConfig(loss="best", extremes=True),
    ],
    ids=["smoothed, per token", "plackett_luce", "extremes"],
)
def test_a_step_of_dpo_never_waits(config: DpoLossConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as watch:
        trained, objective = make(CausalLM, LLAMA), dpo_objective(config, torch.zeros(8, device=DEVICE))
        step(trained, objective, comparisons())
        with watch():
            step(trained, objective, comparisons())


def without_values() -> Trajectory:
    """A whole trajectory on the device, of which the host knows what an update reads before its first step."""
    known = Trajectory.of(some_samples(), "cpu")
    device = {field.name: getattr(known, field.name) for field in dataclasses.fields(known)}
    fields = {name: x.to(DEVICE) for name, x in device.items() if x is not None}
    numbers = ("old_logprob", "reference_logprob", "values", "rewards", "advantages", "returns")
    fields |= {name: torch.empty(len(known.tokens), device=DEVICE) for name in numbers}
    trajectory = Trajectory(**fields)
    trajectory.__dict__.update(bounds=known.bounds, on_host=known.on_host)
    return trajectory


def update_once(monkeypatch: pytest.MonkeyPatch, beat: Callable[[], None] = lambda: None) -> int:
    """An update of policy and critic, watched; reports are not read. Returns the steps taken."""
    steps: list[PendingReport] = []

    def keep(name: str, trained: Trained, own: Sequence[PendingReport], statistics: Any) -> dict[str, float]:
        steps.extend(own)
        return {}

    monkeypatch.setattr(update_module, "_summary", keep)
    options = UpdateOptions(
        epochs=2,
        minibatches=2,
        micro_batch_tokens=48,
        temperature=0.7,
        policy=PolicyOptions(clip_high=0.3, dual_clip=3.0, entropy=0.01, kl_coef=0.1),
        pretraining_coef=0.5,
    )
    with watched(monkeypatch) as watch:
        policy = Trained(*make(CausalLM, LLAMA), lr=lambda _: 1e-3)
        critic = Trained(*make(ScalarModel, SCORED), lr=lambda _: 1e-3)
        trajectory = without_values()
        update(policy, critic, trajectory, options, 0, 0, NOWHERE, packs)  # fills tables that are kept
        steps.clear()
        with watch():
            update(policy, critic, trajectory, options, 0, 1, NOWHERE, packs, beat)
    return len(steps)


def test_an_update_of_policy_and_critic_never_waits_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert update_once(monkeypatch) == 8


def test_a_wait_between_two_steps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostWaits):
        update_once(monkeypatch, beat=lambda: torch.zeros(4, device=DEVICE).__setitem__(1, 2.0))


def test_a_wait_in_an_objective_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    objective: Objective[RankedBatch] = ranking_objective("pairwise", 0.0, 0.0)

    def asking(model: Any, batch: RankedBatch) -> Any:
        loss = objective(model, batch)
        loss.count.item()
        return loss

    with watched(monkeypatch) as watch:
        trained = make(ScalarModel, SCORED)
        step(trained, objective, comparisons())
        with watch(), pytest.raises(RuntimeError, match="meta"):
            step(trained, asking, comparisons())
