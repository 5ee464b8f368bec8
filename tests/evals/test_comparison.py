"""Intervals and paired comparisons against closed forms, an index-by-index bootstrap, and their own promise: 95 %."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import numpy as np
import pytest

from engine.intervals import wilson_interval
from evals import bootstrap
from evals.bootstrap import Interval, Resampled
from evals.comparison import Difference, bootstrap_interval, compare, compare_all, mcnemar, mean_of_ratios
from evals.task import Item, Result


def items_of(parts: list[tuple[float, float]], groups: list[str] | None = None) -> tuple[Item, ...]:
    groups = groups or [""] * len(parts)
    return tuple(
        Item(str(at), {"m": part}, "", "", "", group)
        for at, (part, group) in enumerate(zip(parts, groups, strict=True))
    )


def result_of(parts: list[tuple[float, float]]) -> Result:
    return Result((), items_of(parts))


def means(values: np.ndarray) -> list[tuple[float, float]]:
    return [(float(value), 1.0) for value in values]


def interval_of_ratio(rows: np.ndarray, seed: int, resamples: int, strata: np.ndarray | None = None) -> Interval:
    return Resampled(rows, strata, seed, resamples).interval(mean_of_ratios)


def plain_bootstrap(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """The definition: one resample after the other, each item by its index."""
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        sums = rows[rng.integers(len(rows), size=len(rows))].sum(0)
        values.append(sums[0] / sums[1])
    return np.sort(values)


def test_interval_of_a_mean_is_the_normal_one_where_there_are_many_items() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 4000)
    low, high = bootstrap_interval(items_of(means(values)), "m", seed=1)
    half = NormalDist().inv_cdf(0.975) * values.std() / math.sqrt(len(values))
    # A quantile at 2.5 % of 10,000 replicates has a standard error of sqrt(.025 * .975 / 10000) / density = 0.027
    # standard errors of the mean; four of them.
    slack = 4 * 0.027 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=slack)
    assert high == pytest.approx(values.mean() + half, abs=slack)


def test_replicates_of_an_accuracy_are_binomial() -> None:
    rows = np.array([[1.0, 1.0]] * 12 + [[0.0, 1.0]] * 28)
    drawn = interval_of_ratio(rows, 0, 200_000).replicates
    for successes in range(6, 19):
        exact = math.comb(40, successes) * 0.3**successes * 0.7 ** (40 - successes)
        seen = float(np.isclose(drawn, successes / 40).mean())
        assert seen == pytest.approx(exact, abs=4 * math.sqrt(exact / 200_000))


def test_bootstrap_of_an_accuracy_is_near_wilsons_interval() -> None:
    low, high = bootstrap_interval(items_of([(1.0, 1.0)] * 617 + [(0.0, 1.0)] * 549), "m", seed=0)
    assert (low, high) == pytest.approx(wilson_interval(617 / 1166, 1166), abs=1.5 / 1166)  # a question is 1 / 1166


@pytest.mark.parametrize("count", [60, 400])
def test_replicates_of_a_micro_f1_are_those_of_drawing_one_by_one(count: int) -> None:
    rng = np.random.default_rng(5)
    found = rng.integers(0, 6, count)
    rows = np.stack([2.0 * found, 2.0 * found + rng.integers(0, 8, count)], axis=1)
    rows[0] = 0.0  # a text in which nothing is to find and nothing was found
    ours = interval_of_ratio(rows, 0, 20_000).replicates
    plain = plain_bootstrap(rows, 20_000, seed=1)
    merged = np.concatenate([ours, plain])
    distance = np.abs(
        np.searchsorted(ours, merged, side="right") - np.searchsorted(plain, merged, side="right")
    ).max() / len(plain)
    assert distance < 1.95 * math.sqrt(2 / 20_000)  # Kolmogorov and Smirnov, two samples, one in a thousand


def test_items_that_are_alike_are_drawn_by_kind_with_the_same_distribution() -> None:
    """One row in another row's shape decides whether kinds or places are drawn; the replicates must not tell."""
    alike = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 2.0]] * 20)
    apart = alike + np.random.default_rng(0).normal(0, 1e-9, alike.shape)
    by_kind, by_place = (interval_of_ratio(rows, 0, 20_000).replicates for rows in (alike, apart))
    assert by_kind.std() == pytest.approx(by_place.std(), rel=4 / math.sqrt(20_000))
    assert by_kind.mean() == pytest.approx(by_place.mean(), abs=4 * by_kind.std() * math.sqrt(2 / 20_000))


def test_bundles_of_many_items_vary_as_the_items_do(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).gamma(0.5, 1.0, 30_000)
    rows = np.stack([values, 1.0 + values**0.5], axis=1)
    monkeypatch.setattr(bootstrap, "MOST_ROWS", 2048)
    bundled = [interval_of_ratio(rows, seed, 4000) for seed in range(5)]
    ratio = values.sum() / rows[:, 1].sum()
    spread = math.sqrt(((values - ratio * rows[:, 1]) ** 2).sum()) / rows[:, 1].sum()  # linearised ratio
    # 4000 resamples are off by 1 / sqrt(8000), 2048 bundles by 1 / sqrt(4096): three standard errors of both.
    for found in bundled:
        assert found.replicates.std() == pytest.approx(spread, rel=3 * math.sqrt(1 / 8000 + 1 / 4096))
        assert found.value == pytest.approx(ratio, rel=1e-12)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """600 draws of 40 skewed documents each: the interval of BCa covers the micro-F1 of the population."""
    rng = np.random.default_rng(11)

    def documents(count: int) -> np.ndarray:
        gold = rng.geometric(0.25, count)
        found = rng.binomial(gold, 0.55)
        return np.stack([2.0 * found, gold + found + rng.poisson(0.8, count)], axis=1)

    population = documents(400_000).sum(0)
    truth = population[0] / population[1]
    covered = 0
    for trial in range(600):
        found = interval_of_ratio(documents(40), trial, 1000)
        covered += found.low <= truth <= found.high
    # Three standard errors of 600 trials, and two points that any bootstrap of 40 items may miss.
    assert covered / 600 > 0.95 - 0.02 - 3 * math.sqrt(0.95 * 0.05 / 600)
    assert covered / 600 < 0.95 + 3 * math.sqrt(0.95 * 0.05 / 600)


def test_interval_is_bca_as_the_book_writes_it() -> None:
    """Efron and Tibshirani 1993, equations 14.9, 14.10, 14.14 and 14.15, item by item, on a ratio that is biased."""
    rng = np.random.default_rng(8)
    rows = np.stack([rng.gamma(0.4, 1.0, 25), rng.gamma(2.0, 1.0, 25)], axis=1)
    found = interval_of_ratio(rows, 0, 5000)
    normal, ratio = NormalDist(), lambda some: some[:, 0].sum() / some[:, 1].sum()
    bias = normal.inv_cdf(sum(value < found.value for value in found.replicates) / len(found.replicates))
    without = np.array([ratio(np.delete(rows, place, axis=0)) for place in range(25)])
    influence = without.mean() - without
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    ends = []
    for z in (normal.inv_cdf(0.025), normal.inv_cdf(0.975)):
        tail = normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append(np.quantile(found.replicates, tail))
    assert abs(bias) > 0.02 and acceleration > 0.02  # there is something to correct
    assert (found.low, found.high) == pytest.approx(ends, rel=1e-9)


def test_skewed_interval_leans_the_way_exact_theory_says() -> None:
    """Means of exponentials: chi-squared says how far the exact interval leans to the right; percentiles lean less."""
    n = 20
    values = -np.log(1 - (np.arange(n) + 0.5) / n)  # quantiles of the exponential distribution
    found = interval_of_ratio(np.array(means(values)), 0, 40_000)
    leaning = (found.high - found.value) / (found.value - found.low)
    low, high = np.quantile(found.replicates, [0.025, 0.975])
    # Exact: 2 n mean / chi2(2n) at 2.5 % and 97.5 %, which are 24.433 and 59.342 for 40 degrees of freedom.
    exact = (40 / 24.433 - 1) / (1 - 40 / 59.342)
    assert (high - found.value) / (found.value - low) < leaning < exact


def test_mean_of_groups_is_drawn_within_groups() -> None:
    """Two subjects without any variation inside: how the subjects differ is no uncertainty of their mean."""
    items = items_of(means(np.array([0.0] * 9 + [1.0] * 3)), ["a"] * 9 + ["b"] * 3)
    assert bootstrap_interval(items, "m", seed=0, by_group=True) == (0.5, 0.5)
    low, high = bootstrap_interval(items, "m", seed=0)
    assert low < 0.25 < high


def test_interval_of_a_mean_of_groups_has_the_variance_of_independent_groups() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, 900), rng.normal(5, 3, 300)
    strata = np.array([0] * 900 + [1] * 300)
    rows = np.array(means(np.concatenate([a, b])))
    found = interval_of_ratio(rows, 0, 20_000, strata)
    assert found.value == pytest.approx((a.mean() + b.mean()) / 2, rel=1e-12)
    exact = math.sqrt(a.var() / 900 + b.var() / 300) / 2
    assert found.replicates.std() == pytest.approx(exact, rel=4 / math.sqrt(40_000))


def repeated(items: tuple[Item, ...], times: int) -> tuple[Item, ...]:
    """The same prompts with the same answers, again and again under new ids."""
    return tuple(
        dataclasses.replace(item, id=f"{item.id}.{time}", shown=f"question {item.id}")
        for item in items
        for time in range(times)
    )


@pytest.mark.parametrize("by_group", [False, True])
def test_a_question_that_is_asked_ten_times_tells_no_more_than_once(by_group: bool) -> None:
    rng = np.random.default_rng(5)
    parts = [[(float(x), float(y)) for x, y in rng.integers(1, 9, (30, 2))] for _ in range(2)]
    once = [items_of(of_model, ["a"] * 12 + ["b"] * 18) for of_model in parts]
    often = [repeated(items, 10) for items in once]
    wanted = bootstrap_interval(once[0], "m", seed=1, by_group=by_group)
    assert bootstrap_interval(often[0], "m", seed=1, by_group=by_group) == pytest.approx(wanted)
    one, ten = (compare(Result((), a), Result((), b), "m", seed=1, by_group=by_group) for a, b in (once, often))
    assert (ten.value, ten.low, ten.high, ten.p) == pytest.approx((one.value, one.low, one.high, one.p))
    assert (ten.n, ten.higher) == (300, 10 * one.higher)


def test_order_of_items_does_not_matter_and_the_seed_does() -> None:
    values = np.random.default_rng(0).random(50)
    items = items_of(means(values))
    first = bootstrap_interval(items, "m", seed=0)
    assert bootstrap_interval(items[::-1], "m", seed=0) == first
    assert bootstrap_interval(items, "m", seed=1) != first


def test_nothing_to_measure_has_no_interval() -> None:
    assert all(map(math.isnan, bootstrap_interval((), "m", seed=0)))
    assert all(map(math.isnan, bootstrap_interval(items_of([(1.0, 1.0)]), "m", seed=0)))
    assert all(map(math.isnan, bootstrap_interval(items_of([(0.0, 0.0)] * 5), "m", seed=0)))
    assert all(map(math.isnan, bootstrap_interval(items_of([(1.0, 1.0)] * 5), "another", seed=0)))


def test_paired_difference_knows_that_both_answered_the_same_questions() -> None:
    """Two models whose scores move together: the interval is that of the differences, not of two samples."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 1, 500)
    a, b = common + 0.1 + rng.normal(0, 0.1, 500), common + rng.normal(0, 0.1, 500)
    found = compare(result_of(means(a)), result_of(means(b)), "m", seed=0)
    spread = (a - b).std() / math.sqrt(500)
    assert found.value == pytest.approx((a - b).mean(), rel=1e-12)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.05)
    assert found.low > 0 and found.p == 1 / 10_001 and found.mcnemar is None


def test_p_of_a_difference_is_that_of_the_normal_test() -> None:
    rng = np.random.default_rng(2)
    b = rng.normal(0, 1, 800)
    for shift in (0.02, 0.05, 0.08):
        noise = rng.normal(0, 1, 800)
        a = b + (noise - noise.mean()) / noise.std() + shift
        found = compare(result_of(means(a)), result_of(means(b)), "m", seed=0)
        exact = 2 * NormalDist().cdf(-shift * math.sqrt(800))
        assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000) + 0.01 * exact)


def test_false_alarms_come_as_often_as_the_level_allows() -> None:
    """400 pairs of models that are equally good: p below 0.05 for one in twenty, within three standard errors."""
    rng = np.random.default_rng(4)
    alarms = 0
    for trial in range(400):
        a, b = rng.random((2, 80))
        found = compare(result_of(means(a)), result_of(means(b)), "m", seed=trial, resamples=1000)
        alarms += found.p < 0.05
    assert abs(alarms / 400 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)


def test_only_items_of_both_are_compared_and_the_rest_is_counted() -> None:
    a = Result((), items_of(means(np.array([1.0, 1.0, 0.0, 0.0]))))
    b = Result((), items_of(means(np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])))[1:])
    found = compare(a, b, "m", seed=0)
    assert (found.n, found.unshared) == (3, 3)
    assert (found.higher, found.lower, found.equal) == (1, 1, 1)
    assert found.value == 0.0 and found.p == 1.0


def test_model_that_finds_what_is_not_there_loses_the_item() -> None:
    silent, loud = result_of([(4.0, 6.0), (0.0, 0.0)]), result_of([(4.0, 6.0), (0.0, 3.0)])
    found = compare(silent, loud, "m", seed=0)
    assert (found.higher, found.lower, found.equal) == (1, 0, 1)
    assert found.value == pytest.approx(4 / 6 - 4 / 9)


def test_models_that_answer_the_same_do_not_differ() -> None:
    same = result_of([(1.0, 1.0), (0.0, 1.0), (1.0, 1.0)])
    assert compare(same, same, "m", seed=0) == Difference(0.0, 0.0, 0.0, 1.0, 3, 0, 0, 0, 3, 1.0)


def test_models_without_a_common_item_cannot_be_compared() -> None:
    found = compare(result_of([(1.0, 1.0)]), Result((), ()), "m", seed=0)
    assert math.isnan(found.value) and math.isnan(found.p) and found.n == 0 and found.mcnemar is None


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 0), (8, 2), (2, 8), (10, 10), (40, 61)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    assert mcnemar(only_a, only_b) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-9)


def test_mcnemar_of_a_hundred_thousand_questions_is_the_normal_tail() -> None:
    z = (50_400 - 49_600 - 1) / math.sqrt(100_000)  # Edwards 1948: corrected for continuity
    assert mcnemar(50_400, 49_600) == pytest.approx(2 * NormalDist().cdf(-z), rel=1e-3)


def test_mcnemar_stands_beside_the_bootstrap_of_right_and_wrong_alone() -> None:
    a, b = [(1.0, 1.0)] * 8 + [(0.0, 1.0)] * 12, [(1.0, 1.0)] * 2 + [(0.0, 1.0)] * 18
    assert compare(result_of(a), result_of(b), "m", seed=0).mcnemar == pytest.approx(2 / 2**6)
    by_group = compare(result_of(a), result_of(b), "m", seed=0, by_group=True)
    assert by_group.mcnemar is None  # subjects count the same, their questions do not
    halves = [(0.5, 1.0)] * 20
    assert compare(result_of(a), result_of(halves), "m", seed=0).mcnemar is None


def test_metrics_compared_together_are_those_compared_one_by_one_but_for_the_draws() -> None:
    rng = np.random.default_rng(0)

    def result(scores: np.ndarray, right: np.ndarray) -> Result:
        parts = [{"score": (float(s), 1.0), "right": (float(r), 1.0)} for s, r in zip(scores, right, strict=True)]
        parts[0].pop("score")
        return Result((), tuple(Item(str(at), part, "", "", "") for at, part in enumerate(parts)))

    a, b = (result(rng.random(300), rng.random(300) < share) for share in (0.6, 0.4))
    together = compare_all(a, b, ["score", "right"], seed=0)
    for metric, count in (("score", 299), ("right", 300)):
        alone = compare(a, b, metric, seed=0)
        assert together[metric].n == alone.n == count
        assert together[metric].value == pytest.approx(alone.value, rel=1e-12)
        assert together[metric][6:] == alone[6:]
        # Four standard errors of a quantile at 2.5 % of 10,000 replicates, see above, at either side.
        slack = 4 * 0.027 * (alone.high - alone.low) / (2 * 1.96)
        assert together[metric][1:3] == pytest.approx(alone[1:3], abs=slack * math.sqrt(2))
