"""Intervals against the literature and against the test that they invert."""

import pytest

from engine.intervals import Z, wilson_interval


def test_intervals_are_wilsons() -> None:
    # 28 of 41: the interval that the literature quotes for it, in per cent.
    assert wilson_interval(28 / 41, 41) == pytest.approx((0.530, 0.804), abs=5e-4)
    assert wilson_interval(0.0, 10)[0] == 0 and wilson_interval(1.0, 10)[1] == pytest.approx(1)
    # The bounds are where the score test is at its critical value: (p̂ - p)² = z² p (1 - p) / n.
    for bound in wilson_interval(7 / 50, 50):
        assert (7 / 50 - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound) / 50)


def test_no_trials_say_nothing() -> None:
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
