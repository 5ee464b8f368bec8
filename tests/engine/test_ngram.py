"""Kneser-Ney against a dictionary implementation written from the formula, and against the axioms."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from engine.ngram import NGram

V = 7
rng = np.random.default_rng(3)
TRAIN = [rng.integers(0, V, size=n) for n in (40, 1, 2, 25, 3)]
HELD_OUT = [rng.integers(0, V, size=n) for n in (11, 2, 1, 9)]


def plain_probability(order: int, history: tuple[int, ...], token: int) -> float:
    """Interpolated Kneser-Ney by dictionaries: counts at the top, left continuations below."""
    counts: Counter = Counter()
    for document in TRAIN:
        padded = [V] * (order - 2) + document.tolist()
        for end in range(max(0, order - 2) + 1, len(padded)):
            counts[tuple(padded[end - order + 1 : end + 1])] += 1
    tables = [counts]
    for _ in range(order - 1):
        tables.append(Counter(gram[1:] for gram in tables[-1]))

    probability = 1 / V
    for length, table in zip(range(1, order + 1), reversed(tables), strict=True):
        singles = sum(1 for c in table.values() if c == 1)
        pairs = sum(1 for c in table.values() if c == 2)
        discount = singles / (singles + 2 * pairs) if singles else 0.5
        context = history[len(history) - length + 1 :] if length > 1 else ()
        by_context: dict = defaultdict(dict)
        for gram, c in table.items():
            by_context[gram[:-1]][gram[-1]] = c
        seen = by_context.get(tuple(context))
        if seen:
            total = sum(seen.values())
            probability = (max(seen.get(token, 0) - discount, 0) + discount * len(seen) * probability) / total
    return probability


@pytest.mark.parametrize("order", [2, 3])
def test_loss_equals_the_formula_written_out(order: int) -> None:
    expected, count = 0.0, 0
    for document in HELD_OUT:
        padded = [V] * (order - 2) + document.tolist()
        for end in range(max(0, order - 2) + 1, len(padded)):
            expected -= math.log(plain_probability(order, tuple(padded[end - order + 1 : end]), padded[end]))
            count += 1
    total, predicted = NGram(TRAIN, order, V).loss(HELD_OUT)
    assert predicted == count
    assert total == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_probabilities_after_any_history_sum_to_one(order: int) -> None:
    model = NGram(TRAIN, order, V)
    for history in ([0, 1], [6, 6], [2, 5], [3, 0]):
        total = sum(
            math.exp(-(model.loss([np.array([*history, w])])[0] - model.loss([np.array(history)])[0])) for w in range(V)
        )
        assert total == pytest.approx(1.0, abs=1e-12)


def test_a_repeated_pattern_is_learnt() -> None:
    pattern = np.tile(np.arange(V), 50)
    bits, count = NGram([pattern], 3, V).loss([pattern[:70]])
    assert bits / count < 0.1
