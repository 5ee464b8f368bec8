"""Orders are balanced, and the division of an answer into meaning, order and indecision is exact."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.attitude_orders import Order, decided, entropy, likeliest, normalised, option_orders, to_levels
from model.errors import InputError


@st.composite
def asked_orders(draw: st.DrawFn) -> tuple[int, tuple[Order, ...]]:
    levels = draw(st.integers(2, 6))
    most = math.factorial(levels) // levels
    asked = draw(st.one_of(st.sampled_from(("all", "rotations")), st.integers(1, most).map(lambda n: str(n * levels))))
    return levels, option_orders(levels, asked, draw(st.integers(0, 3)))


@given(asked_orders())
def test_every_letter_stands_for_every_degree_equally_often(found: tuple[int, tuple[Order, ...]]) -> None:
    levels, orders = found
    counts = np.zeros((levels, levels), int)
    for order in orders:
        assert sorted(order) == list(range(levels))
        for letter, level in enumerate(order):
            counts[letter, level] += 1
    assert (counts == len(orders) // levels).all()
    assert len(set(orders)) == len(orders)


def test_all_orders_are_all_and_n_orders_are_n() -> None:
    assert set(option_orders(4, "all", 0)) == set(itertools.permutations(range(4)))
    assert set(option_orders(4, "24", 7)) == set(itertools.permutations(range(4)))
    assert len(option_orders(5, "15", 0)) == 15
    assert option_orders(3, "rotations", 0) == ((0, 1, 2), (1, 2, 0), (2, 0, 1))


def test_a_seed_draws_the_same_orders_and_another_seed_others() -> None:
    assert option_orders(6, "12", 1) == option_orders(6, "12", 1) != option_orders(6, "12", 2)


@pytest.mark.parametrize("asked", ["7", "0", "-5", "many", "125", "5.0", "", "５"])
def test_orders_that_would_not_be_balanced_are_refused(asked: str) -> None:
    with pytest.raises(InputError, match=r"a multiple of 5 up to 120\.$"):
        option_orders(5, asked, 0)


def test_more_orders_than_anyone_wants_have_to_be_counted() -> None:
    with pytest.raises(InputError, match=r"5,040 orders\. Write orders=70, perhaps\.$"):
        option_orders(7, "all", 0)
    assert len(option_orders(7, "70", 0)) == 70


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, tuple[Order, ...]]:
    """Probabilities of letters under a balanced set of orders."""
    levels, orders = draw(asked_orders())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sharpness = draw(st.sampled_from((0.1, 1.0, 10.0)))
    return rng.dirichlet([sharpness] * levels, size=len(orders)), orders


@given(answers())
def test_letters_become_degrees_as_the_orders_say(found: tuple[np.ndarray, tuple[Order, ...]]) -> None:
    letters, orders = found
    by_level = to_levels(letters, orders)
    for row, order, moved in zip(letters, orders, by_level, strict=True):
        for letter, level in enumerate(order):
            assert moved[level] == row[letter]


@given(answers())
def test_meaning_order_and_indecision_add_up_to_one_and_none_is_negative(
    found: tuple[np.ndarray, tuple[Order, ...]],
) -> None:
    shares = decided(to_levels(*found))
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert min(shares) >= 0


@given(answers())
def test_what_the_order_decides_is_the_mutual_information_of_order_and_degree(
    found: tuple[np.ndarray, tuple[Order, ...]],
) -> None:
    by_level = to_levels(*found)
    joint = by_level / len(by_level)  # p(o, v)
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = sum(p * math.log(p / q) for p, q in zip(joint.ravel(), apart.ravel(), strict=True) if p > 0)
    assert decided(by_level)[1] == pytest.approx(information / math.log(by_level.shape[1]), abs=1e-9)


@given(asked_orders(), st.data())
def test_going_by_the_letter_is_all_order_and_going_by_the_meaning_all_meaning(
    found: tuple[int, tuple[Order, ...]], data: st.DataObject
) -> None:
    levels, orders = found
    chosen = data.draw(st.integers(0, levels - 1))
    by_letter = np.tile(np.eye(levels)[chosen], (len(orders), 1))
    assert decided(to_levels(by_letter, orders)) == pytest.approx((0, 1, 0), abs=1e-12)
    by_meaning = np.array([np.eye(levels)[order.index(chosen)] for order in orders])
    assert decided(to_levels(by_meaning, orders)) == pytest.approx((1, 0, 0), abs=1e-12)
    assert by_meaning.mean(0) == pytest.approx(np.full(levels, 1 / levels))
    undecided = np.full((len(orders), levels), 1 / levels)
    assert decided(to_levels(undecided, orders)) == pytest.approx((0, 0, 1), abs=1e-12)


@given(st.lists(st.floats(-900, 0), min_size=2, max_size=6))
def test_probabilities_among_the_letters_and_all_that_falls_on_them(logprobs: list[float]) -> None:
    shares, mass = normalised(np.array(logprobs))
    whole = math.fsum(math.exp(logprob - max(logprobs)) for logprob in logprobs)
    assert shares == pytest.approx([math.exp(logprob - max(logprobs)) / whole for logprob in logprobs])
    assert float(mass) == pytest.approx(math.fsum(map(math.exp, logprobs)), rel=1e-12, abs=1e-300)


def test_letters_that_tie_share_the_answer() -> None:
    assert likeliest(np.array([[0.4, 0.2, 0.4], [0.1, 0.7, 0.2]])).tolist() == [[0.5, 0, 0.5], [0, 1, 0]]


def test_entropy_of_certainty_is_zero_and_of_chance_the_logarithm() -> None:
    assert entropy(np.array([[0, 1, 0], [1 / 3, 1 / 3, 1 / 3]])) == pytest.approx([0, math.log(3)])
