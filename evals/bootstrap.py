"""The bootstrap of anything that is computed from sums over items.

    Resampled(rows, strata, seed).interval(statistic)     the interval of BCa, and the replicates it comes from

Efron and Tibshirani, An Introduction to the Bootstrap (1993): items are drawn again with replacement, as many as there
are, and the number is computed again from their sums; Koehn (2004) brought it to the scores of texts. The interval is
BCa (chapter 14), which percentiles become when they are corrected for bias and for a spread that grows with the value.
Strata, such as the subjects of an examination, keep their sizes: items are drawn within them.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
"""Sums over the items of each stratum, float [..., strata, columns], to the number in question, float [...]."""

CONFIDENCE = 0.95
RESAMPLES = 10_000

CHUNK = 2**20
"""Draws held at once: 8 MB of places, and of how often each comes."""

MOST_ROWS, LEAST_BUNDLES = 16_384, 1024
"""More rows than this are drawn in bundles, see `_bundled`. Then 10,000 resamples take seconds at any number of items,
and the width of an interval is uncertain by 1 / sqrt(2 * 16384) = 0.6 %, less than resampling itself leaves. Strata
share the bundles by their sizes, and have this many at least."""

_NORMAL = NormalDist()


class Interval(NamedTuple):
    """value: over the items as they are; low, high: nan where fewer than two items, or none that counts, were there.
    replicates: float [R], the value of each resample in which there was anything to count."""

    value: float
    low: float
    high: float
    replicates: np.ndarray


class Resampled:
    """Items drawn again, once; any number of statistics can then be asked of the same draws.

    Everything is the same for the same items in any order, and the same seed.

    Args:
        rows: float [N, C], what each item adds to the sums.
        strata: int [N], 0 to S - 1, within which items are drawn; None if they are one stratum.
    """

    def __init__(self, rows: np.ndarray, strata: np.ndarray | None, seed: int, resamples: int = RESAMPLES):
        strata = np.zeros(len(rows), dtype=np.int64) if strata is None else strata
        order = np.lexsort(rows.T)  # so that the order of the items does not matter, not even to the last digit
        rows, strata = rows[order], strata[order]
        self._items = len(rows)
        self._parts = [rows[strata == stratum] for stratum in range(int(strata.max()) + 1)] if len(rows) else []
        if self._items:
            self._totals = np.stack([part.sum(0) for part in self._parts])  # [S, C]
        if self._items > 1:
            rng = np.random.default_rng(seed)
            drawn = [_draw(part, rng, resamples, self._items) for part in self._parts]
            self._drawn = np.stack(drawn, axis=1)  # [R, S, C]

    def interval(self, statistic: Statistic) -> Interval:
        """A number and its 95 % interval."""
        if not self._items:
            return Interval(np.nan, np.nan, np.nan, np.empty(0))
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(self._totals))
            if self._items < 2 or not np.isfinite(value):
                return Interval(value, np.nan, np.nan, np.empty(0))
            replicates = statistic(self._drawn)
            acceleration = _acceleration(self._parts, self._totals, statistic)
        replicates = np.sort(replicates[np.isfinite(replicates)])
        low, high = _bca(value, replicates, acceleration) if len(replicates) else (np.nan, np.nan)
        return Interval(value, low, high, replicates)


def _draw(rows: np.ndarray, rng: np.random.Generator, resamples: int, in_all: int) -> np.ndarray:
    """Sums of as many rows as there are, drawn with replacement: [N, C] -> [resamples, C].

    Rows that are the same are told apart by nothing, so it is enough to draw how many of each kind there are: of an
    accuracy's there are two kinds. Otherwise rows are drawn by their places, and counted.

    Args:
        in_all: how many rows all strata have together.
    """
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    if 8 * len(kinds) <= len(rows):
        return rng.multinomial(len(rows), counts / len(rows), size=resamples) @ kinds
    bundles = max(LEAST_BUNDLES, MOST_ROWS * len(rows) // in_all)
    if len(rows) > bundles:
        rows = _bundled(rng.permutation(rows), bundles)
    n, sums = len(rows), np.empty((resamples, rows.shape[1]))
    for start in range(0, resamples, step := max(1, CHUNK // n)):
        here = min(step, resamples - start)
        places = rng.integers(n, size=(here, n)) + n * np.arange(here)[:, None]
        times = np.bincount(places.ravel(), minlength=here * n).reshape(here, n)
        sums[start : start + here] = times.astype(np.float64) @ rows
    return sums


def _bundled(rows: np.ndarray, bundles: int) -> np.ndarray:
    """Sums of `bundles` random sets of rows, as equal in size as can be.

    A sum over bundles drawn with replacement varies as one over rows does: both have N times the variance of a row.
    """
    return np.add.reduceat(rows, np.arange(bundles) * len(rows) // bundles)


def _acceleration(parts: list[np.ndarray], totals: np.ndarray, statistic: Statistic) -> float:
    """How fast the standard error changes with the value: a sixth of the skewness of the items' influence.

    By leaving each item out (Efron and Tibshirani 1993, equation 14.15); in several strata as Davison and Hinkley
    (1997, section 5.3) weigh them.
    """
    squares = cubes = 0.0
    for stratum, part in enumerate(parts):
        if len(part) < 2:
            continue
        without = np.empty(len(part))
        for start in range(0, len(part), step := max(1, CHUNK // totals.size)):
            left = np.repeat(totals[None], len(part[start : start + step]), axis=0)
            left[:, stratum] -= part[start : start + step]
            without[start : start + step] = statistic(left)
        without = without[np.isfinite(without)]
        if not len(without):
            continue
        influence = (without.mean() - without) * (len(part) - 1) / len(part)
        squares += float((influence**2).sum())
        cubes += float((influence**3).sum())
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _bca(value: float, replicates: np.ndarray, acceleration: float) -> tuple[float, float]:
    """Efron and Tibshirani (1993), equations 14.9, 14.10 and 14.14; replicates that equal the value count half."""
    slack = 1e-12 * max(1.0, abs(value))
    below = np.searchsorted(replicates, [value - slack, value + slack]).sum() / (2 * len(replicates))
    if not 0 < below < 1:  # every replicate on one side: there is nothing to correct by
        tails = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    else:
        bias = _NORMAL.inv_cdf(below)
        points = [bias + _NORMAL.inv_cdf(tail) for tail in ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)]
        tails = tuple(_NORMAL.cdf(bias + point / (1 - acceleration * point)) for point in points)  # type: ignore[assignment]
    low, high = np.quantile(replicates, tails)
    return float(low), float(high)
