"""How far the policy is from the reference, token by token, and how hard that is held against it.

With x = log policy(a) - log reference(a) of a sampled action a (Schulman 2020, "Approximating KL divergence"):

    k1 = x                    unbiased, may be negative
    k2 = x^2 / 2              biased, never negative
    k3 = exp(-x) - 1 + x      unbiased, never negative

As a loss, averaged over the policy's own samples, they pull differently: k2 has the gradient of
KL(policy || reference), k3 that of KL(reference || policy), and k1 none at all.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]
# exp(20) is far beyond what any policy should be told of, and finite in every sum.
_LARGEST = 20.0


def kl_estimate(logprob: Tensor, reference: Tensor, kind: Estimator) -> Tensor:
    """The divergence that each sampled action shows, in nats: fp32 [T], differentiable.

    Args:
        logprob, reference: fp32 [T], of the sampled actions. k3 takes their difference at -20 where it is below, as it
            is exponential there; k1 and k2 take it as it is.
    """
    log_ratio = logprob - reference
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    log_ratio = log_ratio.clamp(min=-_LARGEST)
    return (-log_ratio).expm1() + log_ratio


class KlController:
    """The weight of the divergence: fixed, or steered to a target (Ziegler et al. 2019, section 2.2).

        coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon

    Args:
        coef: to begin with.
        target: nats an answer; None is a fixed weight.
        horizon: answers that a full turn takes; more than these at once count as these.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.coef = coef
        self._target, self._horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Take in the mean divergence of n answers, in nats an answer: once for each rollout."""
        if self._target is not None:
            error = min(max(kl / self._target - 1, -0.2), 0.2)
            self.coef *= 1 + error * min(n / self._horizon, 1.0)

    def state(self) -> dict[str, float]:
        """All that a checkpoint must hold."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Go on from `state()`."""
        self.coef = state["coef"]
