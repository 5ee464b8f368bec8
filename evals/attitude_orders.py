"""Orders in which options are shown, and what answers under many orders say.

An order is a tuple: the degree of agreement (0 the least) that each letter stands for. A set of orders is balanced if
every letter stands for every degree equally often; all sets made here are. Then whoever goes by the letter alone
chooses all degrees equally often, and whoever goes by the meaning alone all letters.

Of an item, p(v | o) is the probability of degree v under order o, and p(v) its mean over orders. The log K nats of a
choice among K degrees divide exactly:

    log K  =  log K - H(V)    decided by the meaning: how far p(v) is from all degrees being alike
           +  I(V; O)         decided by the order of the options: H(V) less the mean of H(V | o)
           +  H(V | O)        undecided: what is left open under an order
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence

import numpy as np

from model.errors import InputError

Order = tuple[int, ...]

LETTERS = "ABCDEFGHI"
MOST_ORDERS = 720
"""All orders of six options; of seven there are 5,040, and each is a prompt for every item."""


def option_orders(levels: int, asked: str, seed: int) -> tuple[Order, ...]:
    """A balanced set of orders.

    Args:
        levels: how many options there are.
        asked: "all" orders; "rotations" of the one from the least agreement to the most; or how many, which are as
            many random orders with their rotations as make that number.
    Raises:
        InputError: it is none of these, or there are not so many.
    """
    in_all = math.factorial(levels)
    if asked == "all":
        if in_all > MOST_ORDERS:
            raise InputError(
                f"orders=all: {levels} options have {in_all:,} orders. Write orders={10 * levels}, perhaps."
            )
        return tuple(itertools.permutations(range(levels)))
    if asked == "rotations":
        return _rotations(tuple(range(levels)))
    most = min(in_all, MOST_ORDERS) // levels * levels
    if not re.fullmatch("[0-9]{1,4}", asked) or int(asked) % levels or not 0 < int(asked) <= most:
        raise InputError(
            f"orders={asked}: not balanced over {levels} letters. Write all, rotations, or a multiple of {levels} up "
            f"to {most}."
        )
    draws = random.Random(seed)
    bases: dict[Order, None] = {}  # orders that begin with 0: one of each set of rotations
    while len(bases) < int(asked) // levels:
        base = (0, *draws.sample(range(1, levels), levels - 1))
        bases[base] = None
    return tuple(order for base in bases for order in _rotations(base))


def _rotations(order: Order) -> tuple[Order, ...]:
    return tuple(order[shift:] + order[:shift] for shift in range(len(order)))


def to_levels(by_letter: np.ndarray, orders: Sequence[Order]) -> np.ndarray:
    """What stands at letters to what stands at degrees of agreement: [..., O, K] -> [..., O, K]."""
    letter_of = np.argsort(np.array(orders), axis=1)  # [O, K], the letter of each degree
    return np.take_along_axis(by_letter, np.broadcast_to(letter_of, by_letter.shape), axis=-1)


def normalised(logprobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities among the letters, and the share of all probability that falls on a letter: [..., K] -> [...,
    K] and [...]."""
    highest = logprobs.max(-1, keepdims=True)
    weights = np.exp(logprobs - highest)
    total = weights.sum(-1, keepdims=True)
    return weights / total, np.exp(highest + np.log(total))[..., 0]


def likeliest(probabilities: np.ndarray) -> np.ndarray:
    """All weight on the likeliest letter, shared among those that tie: [..., K] -> [..., K]."""
    is_highest = probabilities == probabilities.max(-1, keepdims=True)
    return is_highest / is_highest.sum(-1, keepdims=True)


def entropy(probabilities: np.ndarray) -> np.ndarray:
    """In nats, over the last dimension."""
    return (probabilities * -np.log(np.where(probabilities > 0, probabilities, 1.0))).sum(-1)


def decided(levels: np.ndarray) -> tuple[float, float, float]:
    """Shares of log K that are decided by the meaning, decided by the order, and undecided: [O, K] -> three that add up
    to 1."""
    whole = math.log(levels.shape[-1])
    over_all_orders = min(1.0, float(entropy(levels.mean(0))) / whole)
    under_an_order = min(over_all_orders, float(entropy(levels).mean()) / whole)
    return 1 - over_all_orders, over_all_orders - under_an_order, under_an_order
