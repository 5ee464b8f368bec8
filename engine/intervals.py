"""How sure a share is, also when its observations come in clusters.

Pairs of answers to one prompt are not independent: a model that misjudges one answer loses every pair with it. So
prompts are what is counted, and pairs of a prompt are one observation of unequal weight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Z = 1.959964
"""Two-sided 95 % of a normal distribution."""


class Share(NamedTuple):
    """value of a mean, between low and high with 95 % confidence; nan where there is nothing."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]" if self.value == self.value else "none"


def wilson_interval(share: float, trials: float) -> tuple[float, float]:
    """Score interval of a binomial proportion with 95 % confidence (Wilson 1927); (0, 1) of no trials.

    Args:
        share: of successes, in [0, 1].
        trials: how many independent observations it comes from, at least 0; an effective number need not be whole.
    """
    if not trials:
        return 0.0, 1.0
    shrink = 1 + Z**2 / trials
    middle = (share + Z**2 / (2 * trials)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float, int]:
    """A mean, the variance of its estimate, and the number of clusters.

    The mean is a ratio of sums over clusters; its variance is linearised (Cochran 1977, section 6.4).

    Args:
        values: float [N].
        clusters: int [N], which observation belongs to which.
    """
    _, place = np.unique(clusters, return_inverse=True)
    count = len(np.bincount(place))
    mean = float(values.mean()) if len(values) else float("nan")
    if count < 2:
        return mean, float("nan"), count
    residuals = np.bincount(place, weights=values - mean)
    return mean, float(count / (count - 1) * (residuals**2).sum() / len(values) ** 2), count


def clustered_share(values: np.ndarray, clusters: np.ndarray) -> Share:
    """The mean of values in [0, 1] with Wilson's interval (1927) at the effective number of observations.

    That is p (1 - p) / variance, the number of independent ones that would be as sure, at most as many as there are
    (Korn and Graubard 1998). Where clusters do not differ there is no variance to go by: then it is their number.
    """
    share, variance, count = clustered_mean(values, clusters)
    if not count:
        return Share(share, share, share)
    n = min(share * (1 - share) / variance, len(values)) if variance > 0 else count
    return Share(share, *wilson_interval(share, n))


def clustered_difference(values: np.ndarray, clusters: np.ndarray) -> Share:
    """The mean of paired differences with its normal interval."""
    mean, variance, _ = clustered_mean(values, clusters)
    half = Z * variance**0.5
    return Share(mean, mean - half, mean + half)
