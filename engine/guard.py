"""Refuse a step whose loss or gradient is not finite, or leaps far out of its recent range.

The decision is taken on the device from numbers that are equal on all ranks, so all ranks refuse together and
nobody waits for the host; the host reads the outcome one step late. A refused step changes no weight and no
moment. Its statistics are a tensor that the checkpoint holds, so a resumed run decides as an unbroken one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import check_range

# Layout of the state vector.
_MEAN_LOSS, _VAR_LOSS, _MEAN_NORM, _VAR_NORM, _SEEN, SKIPPED, SKIPPED_IN_A_ROW = range(7)


@dataclass
class GuardConfig:
    """When a step is refused, and when the run gives up."""

    sigmas: float = 6.0
    """a leap is this many standard deviations above the running mean"""
    loss_leap: float = 1.0
    """and at least this much above it, in nats a token"""
    norm_leap: float = 10.0
    """and at least this many times the running (geometric) mean of the gradient norm"""
    settle_steps: int = 50
    """accepted steps before leaps are looked for; non-finite steps are always refused"""
    max_in_a_row: int = 10
    """refused steps in a row that end the run with exit code 3"""
    max_total: int = 200
    """refused steps in all that end the run with exit code 3"""

    def check(self) -> None:
        """Raises InputError where a limit makes no sense."""
        check_range("guard", self, 0, "sigmas", "loss_leap")
        check_range("guard", self, 1, "norm_leap", "settle_steps", "max_in_a_row", "max_total")


class Guard:
    """Running statistics of loss and log gradient norm (exponential, horizon 50 steps)."""

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self.config = config
        self.state = torch.zeros(7, dtype=torch.float32, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether this step must be skipped: fp32 scalar, 1 or 0. Updates the statistics.

        Args:
            loss, grad_norm: scalars on the device, the same on every rank.
        """
        mean_loss, var_loss, mean_norm, var_norm, seen, skipped, in_a_row = self.state.unbind()
        loss, log_norm = loss.float(), grad_norm.float().clamp_min(1e-30).log()
        is_finite = torch.isfinite(loss) & torch.isfinite(log_norm)
        leaps = self._leaps(loss, mean_loss, var_loss, self.config.loss_leap)
        leaps |= self._leaps(log_norm, mean_norm, var_norm, math.log(self.config.norm_leap))
        is_bad = ~is_finite | (leaps & (seen >= self.config.settle_steps))
        # A step without a single target has no gradient; it says nothing of the run.
        is_followed = ~is_bad & (grad_norm > 0)

        # The first steps count equally, later ones by a horizon.
        rate = torch.clamp(1 / (seen + 1), min=1 / self.config.settle_steps)
        kept = torch.stack([mean_loss, var_loss, mean_norm, var_norm, seen])
        moved = torch.stack([*_follow(mean_loss, var_loss, loss, rate), *_follow(mean_norm, var_norm, log_norm, rate)])
        accepted = torch.cat([moved, (seen + 1).view(1)])
        bad = is_bad.float()
        self.state = torch.cat(
            [torch.where(is_followed, accepted, kept), torch.stack([skipped + bad, (in_a_row + 1) * bad])]
        )
        return bad

    def _leaps(self, value: Tensor, mean: Tensor, variance: Tensor, floor: float) -> Tensor:
        return value - mean > torch.clamp(self.config.sigmas * variance.sqrt(), min=floor)

    def has_given_up(self, skipped: int, in_a_row: int) -> bool:
        """Whether the run must end, from counts that the host has read."""
        return in_a_row >= self.config.max_in_a_row or skipped >= self.config.max_total


def _follow(mean: Tensor, variance: Tensor, value: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentially weighted mean and variance after one more value (West 1979)."""
    delta = value - mean
    return mean + rate * delta, (1 - rate) * (variance + rate * delta * delta)
