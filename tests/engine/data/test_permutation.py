from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.permutation import Permutation


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097, 100_003])
def test_every_position_is_hit_once(n: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, "key", n)(np.arange(n))), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10**12), key=st.integers(), start=st.integers(0, 10**12))
def test_any_part_of_any_size_is_injective_and_in_range(n: int, key: int, start: int) -> None:
    positions = np.unique(np.arange(start, start + 50) % n)
    values = Permutation(n, key)(positions)
    assert len(np.unique(values)) == len(positions)
    assert values.min() >= 0 and values.max() < n


def test_positions_can_be_asked_for_in_any_order() -> None:
    permutation = Permutation(1000, "a")
    whole = permutation(np.arange(1000))
    chosen = np.array([999, 3, 500])
    assert np.array_equal(permutation(chosen), whole[chosen])


def test_values_do_not_change_between_versions() -> None:
    """The order of documents of every checkpoint there is depends on these numbers."""
    assert Permutation(10, 1, "slots", 0)(np.arange(10)).tolist() == [4, 0, 8, 3, 2, 7, 6, 5, 9, 1]
    large = Permutation(10**9, 1, "slots", 0)(np.arange(4))
    assert large.tolist() == [644345063, 942338624, 973073196, 859533599]


def test_permutations_look_random() -> None:
    n, trials = 5, 4000
    found = np.stack([Permutation(n, "trial", trial)(np.arange(n)) for trial in range(trials)])
    # Where each value lands: n x n cells of trials / n each, binomial. 5 standard deviations for 25 cells.
    counts = np.stack([(found == value).sum(axis=0) for value in range(n)])
    expected = trials / n
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * (1 - 1 / n))
    assert len({tuple(row) for row in found.tolist()}) == 120


def test_neighbours_are_scattered() -> None:
    n = 100_000
    values = Permutation(n, "a")(np.arange(n))
    correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(n)
