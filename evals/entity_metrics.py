"""Metrics of entity extraction, with intervals that share one drawing of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.intervals import wilson_interval
from evals.bootstrap import Resampled, Statistic
from evals.comparison import by_prompt
from evals.entity_scores import Counts
from evals.task import Item, Metric

FAILURES = "parse_failures"
ORDER = ("micro_f1", "precision", "recall", "macro_f1", "relaxed_f1", "span_f1", "span_relaxed_f1", FAILURES)


def measure(
    items: Sequence[Item], by_type: Sequence[Mapping[str, Counts]], seed: int
) -> tuple[tuple[Metric, ...], dict[str, tuple[Metric, ...]]]:
    """The metrics of all types together and of each, over texts.

    A ratio of sums is nan where its denominator is 0: nothing was said (precision), or nothing was there (recall).
    macro_f1 is the mean F1 of the types that annotators found any of. Intervals are of the bootstrap over texts, but
    Wilson's for the share of answers that could not be read; a text that is asked twice tells no more than one.

    Args:
        items: of the texts, all with the same parts.
        by_type: of each text, by the type's name.
    Returns:
        (metrics, metrics by type)
    """
    names = list(items[0].parts) if items else []
    types = list(by_type[0]) if by_type else []
    columns = [[item.parts[name] for name in names] for item in items]
    for row, counts in zip(columns, by_type, strict=True):
        row += (part for name in types for part in (counts[name].f1, counts[name].precision, counts[name].recall))
    rows = np.array(columns, dtype=np.float64).reshape(len(columns), -1)  # [N, 2 (M + 3 T)]
    texts = Resampled(*by_prompt(items, rows), seed)
    own = [len(names) + 3 * place for place in range(len(types))]  # where the types' F1 stand
    golds = rows.sum(0)[[2 * (column + 2) + 1 for column in own]] if len(rows) else np.zeros(len(own))

    def metric(name: str, statistic: Statistic, n: int) -> Metric:
        found = texts.interval(statistic)
        return Metric(name, found.value, found.low, found.high, n)

    metrics = {name: metric(name, _ratio(column), len(rows)) for column, name in enumerate(names)}
    share, prompts = metrics[FAILURES].value, len({item.shown for item in items})
    metrics[FAILURES] = Metric(FAILURES, share, *wilson_interval(share, prompts), len(rows), better="lower")
    counted = [column for column, gold in zip(own, golds, strict=True) if gold]
    metrics["macro_f1"] = metric("macro_f1", _mean([_ratio(column) for column in counted]), len(rows))
    groups = {
        name: tuple(
            metric(of_type, _ratio(column + place), int(gold))
            for place, of_type in enumerate(("f1", "precision", "recall"))
        )
        for name, column, gold in zip(types, own, golds, strict=True)
    }
    order = [name for name in ORDER if name in metrics]
    return tuple(metrics[name] for name in order), groups


def _ratio(column: int) -> Statistic:
    """Of the sums in two columns; nan of 0 over 0."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        top, bottom = sums[..., 0, 2 * column], sums[..., 0, 2 * column + 1]
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), np.nan)

    return statistic


def _mean(statistics: Sequence[Statistic]) -> Statistic:
    """Over those that are numbers: a drawing of texts may be without a type."""

    def statistic(sums: np.ndarray) -> np.ndarray:
        values = np.array([one(sums) for one in statistics])
        return np.nansum(values, axis=0) / np.isfinite(values).sum(axis=0)

    return statistic
