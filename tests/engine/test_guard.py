"""The guard on streams of numbers: what is refused, what is kept, what is counted."""

from __future__ import annotations

import math

import pytest
import torch

from engine.guard import SKIPPED, SKIPPED_IN_A_ROW, Guard, GuardConfig

CPU = torch.device("cpu")


def settled_guard(**options: float) -> Guard:
    """A guard that has seen 200 ordinary steps around loss 3 and norm 1."""
    guard = Guard(GuardConfig(**options), CPU)
    noise = torch.Generator().manual_seed(0)
    for _ in range(200):
        wobble = torch.randn(2, generator=noise) * 0.05
        assert guard.judge(3 + wobble[0], torch.exp(wobble[1])) == 0
    return guard


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf), (4.5, 1.0), (3.0, 15.0)]
)
def test_a_wild_or_non_finite_step_is_refused_and_leaves_the_statistics_alone(loss: float, norm: float) -> None:
    guard = settled_guard()
    before = guard.state.clone()
    assert guard.judge(torch.tensor(loss), torch.tensor(norm)) == 1
    assert torch.equal(guard.state[:5], before[:5])
    assert guard.state[SKIPPED] == 1


@pytest.mark.parametrize(("loss", "norm"), [(3.9, 1.0), (3.0, 9.0), (0.5, 0.01)])
def test_an_ordinary_or_falling_step_is_accepted(loss: float, norm: float) -> None:
    assert settled_guard().judge(torch.tensor(loss), torch.tensor(norm)) == 0


def test_before_it_has_settled_only_non_finite_steps_are_refused() -> None:
    guard = Guard(GuardConfig(), CPU)
    for loss in (11.0, 3.0, 11.0):
        assert guard.judge(torch.tensor(loss), torch.tensor(1.0)) == 0
    assert guard.judge(torch.tensor(math.nan), torch.tensor(1.0)) == 1


def test_a_step_without_targets_is_neither_refused_nor_remembered() -> None:
    guard = settled_guard()
    before = guard.state.clone()
    for _ in range(100):
        assert guard.judge(torch.tensor(0.0), torch.tensor(0.0)) == 0
    assert torch.equal(guard.state, before)
    assert guard.judge(torch.tensor(3.0), torch.tensor(1.0)) == 0


def test_refusals_in_a_row_are_counted_apart_and_end_the_run() -> None:
    guard = settled_guard(max_in_a_row=3)
    for loss in (math.nan, math.nan, 3.0, math.nan, math.nan, math.nan):
        given_up = guard.has_given_up(int(guard.state[SKIPPED]), int(guard.state[SKIPPED_IN_A_ROW]))
        assert not given_up
        guard.judge(torch.tensor(loss), torch.tensor(1.0))
    assert (guard.state[SKIPPED], guard.state[SKIPPED_IN_A_ROW]) == (5, 3)
    assert guard.has_given_up(5, 3)


def test_running_statistics_are_the_weighted_mean_and_variance() -> None:
    guard = Guard(GuardConfig(settle_steps=4), CPU)
    values = [2.0, 2.5, 1.5, 2.2, 2.1, 1.9]
    weights: list[float] = []
    for index, value in enumerate(values):
        rate = max(1 / (index + 1), 1 / 4)
        weights = [weight * (1 - rate) for weight in weights] + [rate]
        guard.judge(torch.tensor(value), torch.tensor(1.0))
    mean = sum(w * v for w, v in zip(weights, values, strict=True))
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    assert guard.state[0].item() == pytest.approx(mean, rel=1e-6)
    assert guard.state[1].item() == pytest.approx(variance, rel=1e-5)
