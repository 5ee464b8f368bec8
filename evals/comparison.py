"""How sure a metric is, and how sure the difference of two models on the same items.

A metric over any set of items is the sum of the numerators of their parts over the sum of the denominators
(`evals.task.Item`); intervals and differences come from drawing items again and summing again (`evals.bootstrap`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from evals.bootstrap import RESAMPLES, Resampled
from evals.task import Item, Result


class Difference(NamedTuple):
    """A metric of one model less that of another, on the items that both have.

    low, high: 95 % interval of the paired bootstrap (BCa); nan where fewer than two prompts are shared.
    p: two-sided. Under "no difference" the replicates are taken to lie around 0 as they lie around the value, so p is
        the share of them that stray as far from the value as the value is from 0, each tail counted, and one more on
        top and bottom (Davison and Hinkley 1997, section 4.2), so never 0.
    n: shared items that have the metric; unshared: items that only one of the two has.
    higher, lower, equal: items that add more, less or as much to the first model's metric as to the second's.
    mcnemar: exact p of McNemar's test where every item is 0 or 1 and counts the same, otherwise None. It goes by the
        items that differ and needs no resampling.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    unshared: int
    higher: int
    lower: int
    equal: int
    mcnemar: float | None


def bootstrap_interval(
    items: Iterable[Item], metric: str, seed: int, resamples: int = RESAMPLES, by_group: bool = False
) -> tuple[float, float]:
    """95 % interval (BCa) of a metric: of the ratio of sums of `Item.parts[metric]`.

    Items without this part are passed over, and those of one prompt are drawn together (`by_prompt`). Where all items
    agree the interval has no width, whatever their number: for shares of successes prefer
    `engine.intervals.wilson_interval`.

    Args:
        by_group: of the mean of the groups' ratios, every group counting the same, drawn within groups.
    Returns:
        (low, high), nan where there are fewer than two prompts.
    """
    counted = [item for item in items if metric in item.parts]
    rows, strata = by_prompt(counted, _rows(counted, metric), _strata(counted, by_group))
    found = Resampled(rows, strata, seed, resamples).interval(mean_of_ratios)
    return found.low, found.high


def compare(
    a: Result, b: Result, metric: str, seed: int, resamples: int = RESAMPLES, by_group: bool = False
) -> Difference:
    """Metric of `a` less that of `b` over the items of both, matched by id: paired bootstrap, and McNemar's test."""
    return compare_all(a, b, [metric], seed, resamples, by_group)[metric]


def compare_all(
    a: Result, b: Result, metrics: Sequence[str], seed: int, resamples: int = RESAMPLES, by_group: bool = False
) -> dict[str, Difference]:
    """`compare` by several metrics at once: those that the same items have share their draws, the costly part."""
    having: dict[tuple[frozenset[str], frozenset[str]], list[str]] = {}
    for metric in metrics:
        ids = [frozenset(item.id for item in result.items if metric in item.parts) for result in (a, b)]
        having.setdefault((ids[0], ids[1]), []).append(metric)
    of_a, of_b = ({item.id: item for item in result.items} for result in (a, b))
    found: dict[str, Difference] = {}
    for (ids_a, ids_b), names in having.items():
        left, right = [[of[id] for id in sorted(ids_a & ids_b)] for of in (of_a, of_b)]
        rows = [np.concatenate([_rows(left, name), _rows(right, name)], axis=1) for name in names]  # each [n, 4]
        resampled = Resampled(*by_prompt(left, np.concatenate(rows, axis=1), _strata(left, by_group)), seed, resamples)
        for at, name in enumerate(names):
            is_share = not by_group and len(rows[at]) > 0 and _is_binary(rows[at])
            found[name] = _difference(resampled, rows[at], 4 * at, len(ids_a ^ ids_b), is_share)
    return {metric: found[metric] for metric in metrics}


def _difference(resampled: Resampled, rows: np.ndarray, column: int, unshared: int, is_share: bool) -> Difference:
    def statistic(sums: np.ndarray) -> np.ndarray:
        return mean_of_ratios(sums[..., column : column + 2]) - mean_of_ratios(sums[..., column + 2 : column + 4])

    found, signs = resampled.interval(statistic), _signs(rows)
    higher, lower = int((signs > 0).sum()), int((signs < 0).sum())
    return Difference(
        found.value,
        found.low,
        found.high,
        _shifted_p(found.value, found.replicates),
        len(rows),
        unshared,
        higher,
        lower,
        len(rows) - higher - lower,
        mcnemar(higher, lower) if is_share else None,
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p: of the items that one alone got right, each is either's with probability one half.

    Twice the smaller tail of Binomial(only_a + only_b, 1/2), at most 1 (McNemar 1947; Edwards 1948 for small counts).
    """
    n, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    most = logs[-1]
    return min(1.0, 2 * math.exp(most - n * math.log(2)) * math.fsum(math.exp(log - most) for log in logs))


def mean_of_ratios(sums: np.ndarray) -> np.ndarray:
    """Numerators over denominators in each stratum, then the mean over strata: [..., S, 2] -> [...]."""
    return (sums[..., 0] / sums[..., 1]).mean(-1)


def by_prompt(
    items: Sequence[Item], rows: np.ndarray, strata: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """What items of one prompt add to the sums, added up: float [N, C] and int [N] -> [P, C] and [P].

    A question that stands in a file twice, or has two reference answers that count apart, tells no more than one: its
    items are drawn together or not at all (in each stratum by itself). Items that show nothing are each one's own.
    """
    of_items: list[int] = [0] * len(items) if strata is None else strata.tolist()
    places: dict[tuple[int, str, str], int] = {}
    where = [
        places.setdefault((stratum, item.shown, "" if item.shown else item.id), len(places))
        for stratum, item in zip(of_items, items, strict=True)
    ]
    if len(places) == len(items):
        return rows, strata
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, where, rows)
    return sums, None if strata is None else np.array([stratum for stratum, *_ in places])


def _rows(items: Sequence[Item], metric: str) -> np.ndarray:
    return np.array([item.parts[metric] for item in items], dtype=np.float64).reshape(-1, 2)


def _strata(items: Sequence[Item], by_group: bool) -> np.ndarray | None:
    return np.unique([item.group for item in items], return_inverse=True)[1] if by_group and items else None


def _shifted_p(value: float, replicates: np.ndarray) -> float:
    if not len(replicates):
        return math.nan
    as_far = np.abs(replicates - value) >= abs(value) * (1 - 1e-12)
    return float((1 + as_far.sum()) / (1 + len(replicates)))


def _signs(rows: np.ndarray) -> np.ndarray:
    """Which model an item speaks for: [n, 4] -> [n].

    An item adds numerator - ratio * denominator to the metric, where the ratio is that of both models together. So a
    text with nothing to find speaks against the model that finds something there, though 0 / 0 is no ratio.
    """
    numerator, denominator = rows[:, [0, 2]], rows[:, [1, 3]]
    ratio = numerator.sum() / denominator.sum() if denominator.sum() else 0.0
    adds = numerator - ratio * denominator
    return np.sign(np.round(adds[:, 0] - adds[:, 1], 12))


def _is_binary(rows: np.ndarray) -> bool:
    return bool(np.isin(rows[:, [0, 2]], (0.0, 1.0)).all() and (rows[:, [1, 3]] == 1.0).all())
