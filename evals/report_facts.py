"""What a report says, gathered from evaluations: all numbers are made here, and the formats only write them down.

report = gather(evaluations)        `evals.report` writes it as JSON, Markdown and HTML
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.intervals import wilson_interval
from evals.comparison import Difference, bootstrap_interval, compare_all
from evals.evaluation import Evaluation
from evals.reward import WinRate, win_rate
from evals.task import Item, Metric, Result
from model.errors import InputError

SEED = 0
SAMPLES = 3
"""Items that are shown of each end, for each model and task."""

LEVEL = 0.05
"""A model stands in bold where p * (number of other models) is below this against each of them (Bonferroni)."""


@dataclass(frozen=True)
class About:
    """A model, and how its numbers were made."""

    model: str
    directory: str
    fingerprint: str
    date: str
    command: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Sample:
    """An item that is shown. value: of the headline metric, on this item alone."""

    id: str
    group: str
    value: float
    prompt: str
    answer: str
    gold: str


@dataclass(frozen=True)
class Clean:
    """What is left without the items that stand in the training texts (`evals.contamination`).

    gram, shards: letters of a gram, and where was looked.
    items, flagged, touched, unchecked: how many items were looked for; stand there; share any gram; were too short.
    share: of all grams that were found.
    metrics: on the items that are not flagged, those that are sums over items.
    """

    gram: int
    shards: tuple[str, ...]
    items: int
    flagged: int
    touched: int
    unchecked: int
    share: float
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class Entry:
    """A model in a task; the fields of `evals.task.Result`, and what follows from them.

    items: how many there are. clean: None where nobody looked for contamination.
    worst, best: items with the lowest and highest value of the headline metric, the better end being `best`; those of
        equal value in an order that is the same for every model and has nothing to do with the file's.
    """

    model: str
    settings: Mapping[str, Any]
    items: int
    metrics: tuple[Metric, ...]
    groups: Mapping[str, tuple[Metric, ...]]
    baselines: tuple[tuple[str, str, float], ...]
    counts: Mapping[str, int]
    notes: tuple[str, ...]
    clean: Clean | None
    worst: tuple[Sample, ...]
    best: tuple[Sample, ...]

    def metric(self, name: str) -> Metric | None:
        return next((metric for metric in self.metrics if metric.name == name), None)


@dataclass(frozen=True)
class Comparison:
    """Metric of model a less that of model b. p: McNemar's where there is one, otherwise the bootstrap's."""

    metric: str
    a: str
    b: str
    difference: Difference
    p: float


@dataclass(frozen=True)
class Wins:
    """How often a reward model prefers model a to model b."""

    a: str
    b: str
    rate: WinRate


@dataclass(frozen=True)
class Section:
    """A task.

    headline: the metric by which it is summed up.
    wins: of every two models, where a reward model judged them.
    leader: the model that is surely better by the headline than every other one; None where there is none.
    """

    label: str
    kind: str
    headline: str
    entries: tuple[Entry, ...]
    comparisons: tuple[Comparison, ...]
    wins: tuple[Wins, ...]
    leader: str | None


@dataclass(frozen=True)
class Report:
    """models and sections in the order of the evaluations."""

    models: tuple[About, ...]
    sections: tuple[Section, ...]


def gather(evaluations: Sequence[Evaluation]) -> Report:
    """The report of evaluations of different models. It reads no file and asks no model, and is the same every time.

    Raises:
        InputError: there is none, or two have the same name.
    """
    names = [evaluation.model for evaluation in evaluations]
    if not names:
        raise InputError("report: no model was evaluated. Give --model a directory.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"report: two of the models are called {twice}. Rename one of the directories.")
    about = tuple(
        About(each.model, each.directory, each.fingerprint, each.date, each.command, each.versions)
        for each in evaluations
    )
    labels = dict.fromkeys(label for each in evaluations for label in each.results)
    return Report(about, tuple(_section(label, evaluations) for label in labels))


def adds_up(metric: Metric, items: Sequence[Item], by_group: bool) -> bool:
    """Whether a metric is the ratio of sums of the items' parts, or the mean of the groups' ratios. A perplexity or a
    corpus BLEU is neither; only sums can be taken again over some of the items, and compared item by item."""
    counted = [item for item in items if metric.name in item.parts]
    return bool(counted) and math.isclose(_ratio(counted, metric.name, by_group), metric.value, rel_tol=1e-6)


def _section(label: str, evaluations: Sequence[Evaluation]) -> Section:
    those = [each for each in evaluations if label in each.results]
    results = {each.model: each.results[label] for each in those}
    metrics = results[those[0].model].metrics
    headline = metrics[0] if metrics else Metric("", math.nan)
    pairs = list(itertools.combinations(results, 2))
    comparisons = tuple(comparison for a, b in pairs for comparison in _compare(a, b, results))
    # Another task of this kind may have rewards of its own; pairs are counted where `evals.reward` made them.
    judged = [item.parts.keys() >= {"reward", "tokens"} for model in results for item in results[model].items]
    is_judged = those[0].kinds[label] == "reward" and bool(judged) and all(judged)
    return Section(
        label,
        those[0].kinds[label],
        headline.name,
        tuple(_entry(each, label) for each in those),
        comparisons,
        tuple(Wins(a, b, win_rate(results[a], results[b])) for a, b in pairs if is_judged),
        _leader(headline, list(results), comparisons),
    )


def _entry(evaluation: Evaluation, label: str) -> Entry:
    result = evaluation.results[label]
    worst, best = _samples(result)
    found = evaluation.contamination.get(label)
    return Entry(
        evaluation.model,
        evaluation.settings.get(label, {}),
        len(result.items),
        result.metrics,
        result.groups,
        result.baselines,
        result.counts,
        result.notes,
        None if found is None else _clean(result, found),
        worst,
        best,
    )


def _compare(a: str, b: str, results: Mapping[str, Result]) -> list[Comparison]:
    """By every metric that is the same kind of sum of both."""
    found: dict[str, Difference] = {}
    names = [metric.name for metric in results[a].metrics]
    for by_group in (False, True):
        kinds = [
            {metric.name for metric in results[model].metrics if adds_up(metric, results[model].items, by_group)}
            for model in (a, b)
        ]
        those = [name for name in names if name in kinds[0] & kinds[1] and name not in found]
        found |= compare_all(results[a], results[b], those, SEED, by_group=by_group)
    return [_comparison(name, a, b, found[name]) for name in names if name in found and found[name].n]


def _comparison(metric: str, a: str, b: str, found: Difference) -> Comparison:
    return Comparison(metric, a, b, found, found.p if found.mcnemar is None else found.mcnemar)


def _leader(headline: Metric, models: Sequence[str], comparisons: Sequence[Comparison]) -> str | None:
    """The model that wins every one of its comparisons by the headline metric."""
    sign = {"higher": 1, "lower": -1}.get(headline.better or "", 0)
    wins = dict.fromkeys(models, 0)
    for comparison in comparisons:
        if comparison.metric == headline.name and comparison.p * (len(models) - 1) < LEVEL:
            gain = sign * comparison.difference.value
            if gain:
                wins[comparison.a if gain > 0 else comparison.b] += 1
    return next((model for model in models if len(models) > 1 and wins[model] == len(models) - 1), None)


def _clean(result: Result, found: Any) -> Clean:
    flagged = set(found.flagged)
    kept = [item for item in result.items if item.id not in flagged]
    metrics = []
    for metric in result.metrics:
        kind = next((by_group for by_group in (False, True) if adds_up(metric, result.items, by_group)), None)
        if kind is not None:
            metrics.append(_again(metric, kept, kind))
    counts = len(found.items), len(flagged), len(found.touched), len(found.unchecked)
    return Clean(found.n, tuple(found.shards), *counts, found.share, tuple(metrics))


def _again(metric: Metric, items: Sequence[Item], by_group: bool) -> Metric:
    """A metric over some of its items, with its interval: Wilson's for shares of successes."""
    counted = [item for item in items if metric.name in item.parts]
    value = _ratio(counted, metric.name, by_group)
    parts = {item.parts[metric.name] for item in counted}
    if counted and not by_group and parts <= {(0, 1), (1, 1)}:
        low, high = wilson_interval(value, len(counted))
    else:
        low, high = bootstrap_interval(counted, metric.name, SEED, by_group=by_group)
    return Metric(metric.name, value, low, high, len(counted), metric.unit, metric.better)


def _ratio(items: Sequence[Item], metric: str, by_group: bool) -> float:
    sums: dict[str, list[float]] = {}
    for item in items:
        total = sums.setdefault(item.group if by_group else "", [0.0, 0.0])
        for place in (0, 1):
            total[place] += item.parts[metric][place]
    if not sums or any(total[1] == 0 for total in sums.values()):
        return math.nan
    return math.fsum(top / bottom for top, bottom in sums.values()) / len(sums)


def _samples(result: Result) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    if not result.metrics:
        return (), ()
    headline = result.metrics[0]
    values = {
        item.id: item.parts[headline.name][0] / item.parts[headline.name][1]
        for item in result.items
        if headline.name in item.parts and item.parts[headline.name][1]
    }
    sign = -1 if headline.better == "lower" else 1
    ranked = sorted(
        (item for item in result.items if item.id in values),
        key=lambda item: (sign * values[item.id], hashlib.sha256(item.id.encode("utf-8", "replace")).digest()),
    )
    shown = [Sample(item.id, item.group, values[item.id], item.shown, item.answer, item.gold) for item in ranked]
    least, most = (shown[0].value, shown[-1].value) if shown else (0.0, 0.0)
    worst = tuple(sample for sample in shown[:SAMPLES] if sample.value != most)
    best = tuple(sample for sample in reversed(shown[-SAMPLES:]) if sample.value != least or least == most)
    return worst, best
