"""The order in which documents are seen: a function of (seed, corpus, epoch, position), never a list.

A source of weight w is w times as long as itself in every epoch of the mixture. It is walked in passes, each of
which is a fresh permutation of all its documents: at weight 1 an epoch is one pass, at weight 1/2 it is half of one
(and the next epoch the other half), at weight 2 it is two. The epoch's slots are then permuted over the sources.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from engine.data.corpus import Corpus
from engine.data.permutation import Permutation


class Mixture:
    """The endless sequence of a corpus's documents, epoch by epoch."""

    def __init__(self, corpus: Corpus, seed: int) -> None:
        self.corpus = corpus
        self._seed = seed
        # A few epochs and passes are in use at a time.
        self._permutation = lru_cache(maxsize=256)(self._make_permutation)
        self._bounds = lru_cache(maxsize=16)(self._make_bounds)

    def epoch_length(self, epoch: int) -> int:
        """Documents in an epoch. Fractional weights may make epochs differ by one a source."""
        return int(self._bounds(epoch)[-1])

    def documents(self, epoch: int, first: int, last: int) -> np.ndarray:
        """Numbers of the documents in slots [first, last) of an epoch: int64."""
        bounds = self._bounds(epoch)
        slots = self._permutation(int(bounds[-1]), "slots", epoch)(np.arange(first, last))
        found = np.empty(len(slots), np.int64)
        sources = np.searchsorted(bounds, slots, side="right") - 1
        for source in np.unique(sources):
            chosen = sources == source
            walked = self._walked(int(source), epoch) + slots[chosen] - bounds[source]
            found[chosen] = self._at(int(source), walked)
        return found

    def _walked(self, source: int, epoch: int) -> int:
        """Documents of a source in all epochs before this one."""
        return int(epoch * self.corpus.weights[source] * len(self.corpus.selections[source]))

    def _make_bounds(self, epoch: int) -> np.ndarray:
        """[S+1] Where each source's slots begin, before they are permuted."""
        sources = range(len(self.corpus.selections))
        return np.cumsum([0, *(self._walked(source, epoch + 1) - self._walked(source, epoch) for source in sources)])

    def _at(self, source: int, walked: np.ndarray) -> np.ndarray:
        """Documents of a source at these steps of its endless walk."""
        selection = self.corpus.selections[source]
        passes, positions = np.divmod(walked, len(selection))
        for number in np.unique(passes):
            chosen = passes == number
            permutation = self._permutation(len(selection), "pass", source, int(number))
            positions[chosen] = permutation(positions[chosen])
        return selection[positions]

    def _make_permutation(self, n: int, *key: str | int) -> Permutation:
        return Permutation(n, self._seed, self.corpus.fingerprint, *key)
