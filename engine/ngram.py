"""Smoothed n-gram models: what a language model must beat to have learnt more than neighbours.

Interpolated Kneser-Ney (Ney, Essen & Kneser 1994; Chen & Goodman 1999, section 4.2.1) with one discount an
order, D = n1 / (n1 + 2 n2): the highest order counts occurrences, lower ones count distinct left neighbours,
and below the unigrams lies the uniform distribution over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Ids = np.ndarray


@dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted n-grams as integers, and per context its total and number of types."""

    grams: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    types: Ids
    discount: float


class NGram:
    """A model of token sequences.

    Args:
        documents: int arrays; the first token of each is given, never predicted.
        order: 2 for bigrams, 3 for trigrams.
        vocab_size: ids are below it; vocab_size ** order must fit 63 bits.
    """

    def __init__(self, documents: Iterable[Ids], order: int, vocab_size: int) -> None:
        # One more id stands before the first token, so that the second has a full context.
        self._base = vocab_size + 1
        self._vocab_size = vocab_size
        assert order >= 1 and self._base**order < 2**63
        self._order = order
        parts = [self._grams(document, order) for document in documents]
        grams, counts = np.unique(np.concatenate(parts) if parts else np.empty(0, np.int64), return_counts=True)
        self._orders: list[_Order] = []
        for n in range(order, 0, -1):
            self._orders.append(self._summarise(grams, counts))
            if n > 1:
                grams, counts = np.unique(grams % self._base ** (n - 1), return_counts=True)

    def loss(self, documents: Iterable[Ids]) -> tuple[float, int]:
        """Sum of negative log-probabilities in nats, and the number of predicted tokens."""
        total, count = 0.0, 0
        for document in documents:
            grams = self._grams(document, self._order)
            total -= float(np.log(self._probability(grams)).sum())
            count += len(grams)
        return total, count

    def _grams(self, document: Ids, order: int) -> Ids:
        """Every n-gram that ends in a predicted token, as one integer each."""
        padding = max(0, order - 2)
        ids = np.concatenate([np.full(padding, self._vocab_size), np.asarray(document)]).astype(np.int64)
        length = len(document) - 1
        grams = np.zeros(max(0, length), dtype=np.int64)
        for offset in range(order):
            start = padding + 1 - (order - 1) + offset
            grams = grams * self._base + ids[start : start + length] if length > 0 else grams
        return grams

    def _summarise(self, grams: Ids, counts: Ids) -> _Order:
        contexts, first, types = np.unique(grams // self._base, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if len(counts) else counts
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        discount = once / (once + 2 * twice) if once else 0.5
        return _Order(grams, counts, contexts, totals, types, discount)

    def _probability(self, grams: Ids) -> Ids:
        probability = np.full(len(grams), 1.0 / self._vocab_size)
        for n, level in zip(range(1, self._order + 1), reversed(self._orders), strict=True):
            shortened = grams % self._base**n
            count = _look_up(level.grams, level.counts, shortened)
            context = shortened // self._base
            total = _look_up(level.contexts, level.totals, context)
            types = _look_up(level.contexts, level.types, context)
            seen = total > 0
            above = np.maximum(count - level.discount, 0) + level.discount * types * probability
            probability = np.where(seen, above / np.maximum(total, 1), probability)
        return probability


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    """values[key] for each wanted key, 0 where it is absent; `keys` is sorted."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, values[index], 0)
