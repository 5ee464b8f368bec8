"""Groups of answers as a corpus: what the order, the packing and the held-out split of documents do, they do to groups.

A group's tokens are those of all its sequences, so a packer that cuts no document splits no group.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.corpus import Corpus, Store, source_weights
from engine.data.group_index import open_index
from engine.data.ranked_encoder import unpack
from engine.data.selection import Selection
from engine.data.shards import TRAINED, Prepared


class Group(NamedTuple):
    """A prompt with its answers, K sequences.

    ids: int64 each; the prompt, an answer, its end token.
    answer_starts: where the compared answer begins in each sequence.
    grades: higher is better; not all are equal.
    first_sequence: number of the first sequence in the whole set; the others follow.
    """

    ids: list[np.ndarray]
    answer_starts: list[int]
    grades: list[float]
    first_sequence: int


class Groups(Store):
    """All groups of a prepared directory, in the place of its documents.

    Attributes:
        facts: of all of them.
    """

    def __init__(self, directory: Path, max_responses: int) -> None:
        index = open_index(directory, max_responses)
        super().__init__([[Prepared(directory)]])
        self.facts = index.facts
        self.fingerprint = index.facts.fingerprint
        self.groups, self.members = index.groups, index.members
        first = self.members[self.groups["members"]]
        self.source_bounds = np.searchsorted(first, self.source_bounds)

    def __len__(self) -> int:
        return self.facts.groups

    @property
    def num_tokens(self) -> int:
        return int(self.groups["tokens"].sum(dtype=np.int64))

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self.groups["tokens"][documents].astype(np.int64)

    def sequences(self, documents: np.ndarray) -> np.ndarray:
        """Sequences of each group: int64, the shape of `documents`."""
        return self.groups["sequences"][documents].astype(np.int64)

    def hashes(self, first: int, last: int) -> np.ndarray:
        return np.ascontiguousarray(self.groups["hashes"][first:last])

    def tokens_between(self, first: int, last: int) -> int:
        return int(self.groups["tokens"][first:last].sum(dtype=np.int64))

    def group(self, number: int) -> Group:
        """A group by its number."""
        end = self.groups["members"][number + 1] if number + 1 < len(self) else len(self.members)
        ids: list[np.ndarray] = []
        grades: list[float] = []
        for record in self.members[self.groups["members"][number] : end].tolist():
            answers = unpack(super().read(record))
            ids += answers.ids
            grades += answers.grades.tolist()
        starts = [int(np.argmax(cells >= TRAINED)) for cells in ids]
        plain = [(cells % TRAINED).astype(np.int64) for cells in ids]
        return Group(plain, starts, grades, int(self.groups["sequence"][number]))


class PreferenceSet(Corpus):
    """Groups to train on or to evaluate; its documents are groups, `documents()` their numbers.

    Attributes:
        most_responses, most_tokens: of a group.
        shortest: tokens of the shortest sequence.
        num_sequences: of the whole set before anything was held out; the numbers in `RankedBatch.sequence` are below.
    """

    store: Groups

    @property
    def num_groups(self) -> int:
        return self.num_documents

    @property
    def num_responses(self) -> int:
        return int(self.store.sequences(self.documents()).sum())

    @property
    def most_responses(self) -> int:
        return self.store.facts.most_responses

    @property
    def most_tokens(self) -> int:
        return self.store.facts.most_tokens

    @property
    def shortest(self) -> int:
        return self.store.facts.shortest

    @property
    def num_sequences(self) -> int:
        return self.store.facts.sequences

    def group(self, number: int) -> Group:
        """A group by its number in `documents()`."""
        return self.store.group(number)


def open_groups(directory: Path, weights: list[float] | None, max_responses: int) -> PreferenceSet:
    """The groups of a prepared directory, put together on first use.

    Args:
        weights: epochs of each source in one epoch of the mixture.
    Raises:
        InputError: as many weights as sources are needed.
    """
    groups = Groups(directory, max_responses)
    bounds = groups.source_bounds.tolist()
    selections = [Selection(first, last, np.empty(0, np.int64)) for first, last in itertools.pairwise(bounds)]
    shares: list[Fraction] = source_weights(weights, groups.sources)
    return PreferenceSet(groups, selections, shares, groups.facts.duplicates)
