"""Estimates of the divergence, against sums over a whole small vocabulary; and the controller."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from rlhf.kl import Estimator, KlController, kl_estimate

# Two distributions over six tokens, far apart and close.
REFERENCE = torch.tensor([0.4, -1.0, 2.0, 0.0, -0.3, 1.1], dtype=torch.float64)
POLICIES = [
    torch.tensor([1.9, 0.2, -0.5, 0.7, 0.1, 0.0], dtype=torch.float64),
    REFERENCE + 0.02 * torch.tensor([1.0, -1.0, 0.5, 0.0, 2.0, -0.5], dtype=torch.float64),
]


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("logits", POLICIES)
def test_k1_and_k3_are_the_divergence_on_average(logits: torch.Tensor) -> None:
    policy, reference = logits.log_softmax(0), REFERENCE.log_softmax(0)
    for kind in ("k1", "k3"):
        mean = (policy.exp() * kl_estimate(policy, reference, kind)).sum()
        torch.testing.assert_close(mean, divergence(policy, reference), rtol=1e-10, atol=0)


def test_k1_may_be_negative_and_the_others_never_are() -> None:
    log_ratio = torch.cat(
        [torch.linspace(-30, 30, 4001), 10.0 ** torch.arange(-6.0, 0), -(10.0 ** torch.arange(-6.0, 0))]
    )
    zero = torch.zeros_like(log_ratio)
    assert (kl_estimate(log_ratio, zero, "k1") < 0).any()
    for kind in ("k2", "k3"):
        estimate = kl_estimate(log_ratio, zero, kind)
        assert (estimate >= 0).all() and estimate.isfinite().all()


@pytest.mark.parametrize("kind", get_args(Estimator))
def test_equal_log_probabilities_diverge_by_exactly_nothing(kind: Estimator) -> None:
    logprob = torch.randn(50)
    assert not kl_estimate(logprob, logprob.clone(), kind).any()


def test_values_by_hand() -> None:
    logprob, reference = torch.tensor([-1.0, -2.5]), torch.tensor([-1.5, -2.0])
    expected = {
        "k1": [0.5, -0.5],
        "k2": [0.125, 0.125],
        "k3": [np.exp(-0.5) - 1 + 0.5, np.exp(0.5) - 1 - 0.5],
    }
    for kind in get_args(Estimator):
        torch.testing.assert_close(kl_estimate(logprob, reference, kind), torch.tensor(expected[kind]).float())


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    low = torch.tensor([-300.0], requires_grad=True)
    estimate = kl_estimate(low, torch.zeros(1), "k3")
    estimate.sum().backward()
    assert estimate.isfinite().all() and estimate > 1e8
    assert low.grad is not None and low.grad.isfinite().all()


@pytest.mark.parametrize("logits", POLICIES)
def test_as_a_loss_k2_pulls_to_the_reference_and_k3_along_the_reverse_divergence(logits: torch.Tensor) -> None:
    """What each estimate's gradient is on average over the policy's own samples."""
    reference = REFERENCE.log_softmax(0)

    def gradient(of: str) -> torch.Tensor:
        leaf = logits.clone().requires_grad_()
        policy = leaf.log_softmax(0)
        if of == "forward":
            divergence(policy, reference).backward()
        elif of == "reverse":
            divergence(reference, policy).backward()
        else:
            (policy.detach().exp() * kl_estimate(policy, reference, of)).sum().backward()  # type: ignore[arg-type]
        assert leaf.grad is not None
        return leaf.grad

    torch.testing.assert_close(gradient("k2"), gradient("forward"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient("k3"), gradient("reverse"), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient("k1"), torch.zeros_like(logits), rtol=0, atol=1e-12)
    assert (gradient("k3") - gradient("forward")).abs().max() > 1e-6


def test_the_controller_follows_its_formula() -> None:
    controller = KlController(0.1, target=6.0, horizon=1000)
    coef = 0.1
    for kl, n in [(6.0, 64), (60.0, 64), (0.0, 128), (6.6, 64), (5.7, 500), (-3.0, 64)]:
        coef *= 1 + np.clip(kl / 6.0 - 1, -0.2, 0.2) * n / 1000
        controller.update(kl, n)
        assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_a_divergence_above_its_target_raises_the_coefficient() -> None:
    controller = KlController(0.1, target=6.0, horizon=100)
    controller.update(7.0, 10)
    assert controller.coef > 0.1


def test_the_coefficient_stays_positive_whatever_the_number_of_answers() -> None:
    controller = KlController(0.1, target=6.0, horizon=10)
    controller.update(0.0, 1000)
    assert controller.coef == pytest.approx(0.08)


def test_without_a_target_the_coefficient_is_fixed() -> None:
    controller = KlController(0.05)
    controller.update(100.0, 512)
    assert controller.coef == 0.05


def test_a_controller_goes_on_from_its_state() -> None:
    unbroken = KlController(0.1, target=6.0, horizon=100)
    resumed = KlController(0.1, target=6.0, horizon=100)
    unbroken.update(9.0, 30)
    resumed.load(unbroken.state())
    for controller in (unbroken, resumed):
        controller.update(2.0, 30)
    assert resumed.coef == unbroken.coef != 0.1
