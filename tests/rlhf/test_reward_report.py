"""The report on a reward model: hand-made scores, and intervals that hold what they promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.intervals import clustered_difference, clustered_share
from rlhf.reward_report import Judged, markdown, measure, summary, verdict, write_report


def judged(*answers: tuple[int, float, float, int], std: float = 1.0) -> Judged:
    """Rows of prompt, grade, score, length."""
    groups, grades, scores, lengths = (np.array(column) for column in zip(*answers, strict=True))
    return Judged(scores.astype(float), grades.astype(float), groups, lengths, std)


def test_pairs_of_a_prompt_are_counted_by_hand() -> None:
    """Three answers to prompt 0, of which two are tied, and two to prompt 1."""
    figures = measure(
        judged(
            (0, 2.0, 1.5, 10),  # better than both: right against the second, wrong against the third
            (0, 1.0, 0.5, 30),
            (0, 1.0, 2.5, 10),
            (1, 0.0, 1.0, 10),
            (1, 5.0, 4.0, 40),  # right
            std=2.0,
        )
    )
    assert (figures["prompts"], figures["pairs"], figures["tied_pairs"]) == (2, 3, 1)
    assert figures["accuracy"].value == 2 / 3
    assert figures["longer_wins"].value == (0 + 0.5 + 1) / 3
    assert figures["margin"] == pytest.approx((1.0 - 1.0 + 3.0) / 3 / 2)
    shorter, equal, longer = figures["by_better"]
    assert [row["pairs"] for row in (shorter, equal, longer)] == [1, 1, 1]
    assert [row["accuracy"].value for row in (shorter, equal, longer)] == [1.0, 0.0, 1.0]
    assert [row["pairs"] for row in figures["by_length"]] == [1, 0, 1, 0, 1]
    assert [(row["name"], row["pairs"], row["margin"]) for row in figures["by_grade"]] == [
        ("1", 2, pytest.approx(0.0)),
        ("5", 1, pytest.approx(1.5)),
    ]


def test_equal_scores_count_half() -> None:
    assert measure(judged((0, 1.0, 0.3, 5), (0, 0.0, 0.3, 9)))["accuracy"].value == 0.5


def simulated(prompts: int, answers: int, seed: int, noise: float = 1.0, by_length: float = 0.0) -> Judged:
    """Grades are what a prompt's answers are worth; scores see it through noise, or see the length."""
    generator = np.random.default_rng(seed)
    worth = generator.normal(size=(prompts, answers))
    lengths = generator.integers(5, 100, size=(prompts, answers))
    scores = worth + noise * generator.normal(size=worth.shape)
    scores = (1 - by_length) * scores + by_length * lengths
    groups = np.repeat(np.arange(prompts), answers)
    return Judged(scores.ravel(), worth.ravel(), groups, lengths.ravel())


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Pairs of six answers depend on each other: an interval over pairs would be too narrow, one over prompts is not.

    With scores = worth + noise of the same size, the truth is 1/2 + arcsin(correlation) / pi = 3/4.
    """
    hits, naive, runs = 0, 0, 400
    for seed in range(runs):
        accuracy = measure(simulated(prompts=40, answers=6, seed=seed))["accuracy"]
        hits += accuracy.low <= 0.75 <= accuracy.high
        naive += abs(accuracy.value - 0.75) <= 1.96 * (0.75 * 0.25 / (40 * 15)) ** 0.5
    # Three standard deviations of a share of 0.95 over 400 runs are 0.033.
    assert abs(hits / runs - 0.95) < 0.033
    assert naive / runs < 0.95 - 0.033


def test_with_one_pair_a_prompt_the_interval_is_wilsons() -> None:
    """30 of 40: the interval of independent observations, but for one degree of freedom."""
    found = clustered_share(np.repeat([1.0, 0.0], [30, 10]), np.arange(40))
    assert found.value == 0.75
    assert (found.low, found.high) == pytest.approx((0.5981, 0.8581), abs=0.004)


def test_a_perfect_share_is_as_sure_as_its_prompts_are_many() -> None:
    """Never certain: 20 of 20 prompts are between 84 % and 100 %, however many pairs each has."""
    found = clustered_share(np.ones(200), np.repeat(np.arange(20), 10))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 / (1 + 1.96**2 / 20), abs=1e-3)


def test_a_difference_is_nought_where_two_rules_agree() -> None:
    assert clustered_difference(np.zeros(50), np.arange(50)) == (0.0, 0.0, 0.0)


def test_a_ruler_is_told_from_a_judge() -> None:
    judge = verdict(measure(simulated(200, 4, seed=0)))
    ruler = measure(simulated(200, 4, seed=0, by_length=1.0))
    assert "the model beats it by +" in judge
    assert ruler["accuracy"].value == ruler["longer_wins"].value
    assert "does NOT surely beat it, by +0.0 points" in verdict(ruler)
    backwards = simulated(200, 4, seed=0)
    backwards = Judged(-backwards.scores, backwards.grades, backwards.groups, backwards.lengths)
    assert "the model is WORSE than that" in verdict(measure(backwards))


def test_calibration_finds_scores_that_promise_too_much() -> None:
    """Answers are drawn to win as often as sigmoid(margin) says: then the error is small, and ten times the margin
    is overconfident."""
    generator = np.random.default_rng(0)
    margins = generator.normal(size=20_000)
    wins = generator.random(20_000) < 1 / (1 + np.exp(-margins))
    groups = np.repeat(np.arange(20_000), 2)
    grades = np.stack([wins, ~wins], axis=1).ravel().astype(float)
    scores = np.stack([margins, np.zeros(20_000)], axis=1).ravel()
    ones = np.ones(40_000, np.int64)
    calibrated = measure(Judged(scores, grades, groups, ones))["calibration"]
    assert calibrated["error"] < 0.01
    assert [row["from"] for row in calibrated["bins"]] == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert all(row["from"] <= row["predicted"] <= row["to"] for row in calibrated["bins"])
    assert measure(Judged(10 * scores, grades, groups, ones))["calibration"]["error"] > 0.15


def test_the_report_is_kept_for_people_and_for_programs(tmp_path: Path) -> None:
    figures = measure(simulated(50, 3, seed=1))
    write_report(tmp_path, figures)
    kept: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert kept["accuracy"] == list(figures["accuracy"]) and kept["pairs"] == 150
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(figures)
    for line in summary(figures).splitlines():
        assert line in text
    assert "| more than twice as long |" in text and "| 90% to 100% |" in text


def test_no_pairs_are_said_to_be_none() -> None:
    assert "nobody knows how good the model is" in summary(measure(Judged.empty()))


def test_the_best_answers_are_the_first_with_the_highest_grade() -> None:
    answers = judged((0, 1.0, 9.0, 5), (0, 3.0, 2.0, 5), (0, 3.0, 4.0, 5), (4, 0.0, 7.0, 5), (4, -1.0, 8.0, 5))
    assert answers.best.tolist() == [1, 3]
