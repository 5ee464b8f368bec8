"""Which test items stand in the training texts: n-grams of letters that both have.

Method. Every item's texts are cut into their overlapping n-grams of letters (`grams.py`: width, case, spaces and
punctuation do not count), and the training texts are read once, gram by gram. Numbers of 64 bits find candidates, and
letters are compared before a gram counts as found.

Length of a gram. GPT-3 (Brown et al. 2020, appendix C) counts 13-grams of words, and never fewer than 8 words because
shorter ones collide by chance. A word of Chinese has between one and two letters, so 13 Chinese letters are about the 8
words that GPT-3 allows as its least.

When an item is flagged. At least FLAGGED_SHARE of its grams stand in the training texts, as in PaLM (Chowdhery et al.
2022, section 8: 70 % of an example's 8-grams), or FLAGGED_LETTERS in a row do, as in GPT-4 (OpenAI 2023, appendix C: a
substring of 50 characters, without spaces and symbols). What has any gram found is `touched`, which is what GPT-3 calls
dirty: a generous count, for phrases that every textbook has belong to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evals.gram_index import GramIndex
from evals.gram_index import Overlap as Overlap
from evals.training_texts import read_training_texts
from evals.windows import windows
from model.errors import InputError

GRAM = 13
FLAGGED_SHARE = 0.7
FLAGGED_LETTERS = 50


@dataclass(frozen=True)
class Contamination:
    """What the training texts hold of a task.

    n: letters of a gram.
    shards: the paths that were looked through.
    letters: that were read there.
    items: by id, in the order given.
    """

    n: int
    shards: tuple[str, ...]
    letters: int
    items: Mapping[str, Overlap]

    @property
    def flagged(self) -> tuple[str, ...]:
        """Items that the model may have learned by heart: see the top of this file."""
        return tuple(
            name for name, item in self.items.items() if item.share >= FLAGGED_SHARE or item.longest >= FLAGGED_LETTERS
        )

    @property
    def touched(self) -> tuple[str, ...]:
        """Items of which any gram was found."""
        return tuple(name for name, item in self.items.items() if item.found)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Items whose texts are all shorter than a gram: nothing could be looked for."""
        return tuple(name for name, item in self.items.items() if not item.grams)

    @property
    def share(self) -> float:
        """Of all items' grams that were found; 0 where there are none."""
        grams = sum(item.grams for item in self.items.values())
        return sum(item.found for item in self.items.values()) / grams if grams else 0.0


def find_overlap(
    texts: Mapping[str, Sequence[str]], shards: Sequence[str | os.PathLike[str]], n: int = GRAM
) -> Contamination:
    """Look for test items in training texts.

    Args:
        texts: of each item, by id. Grams do not reach from one text into another.
        shards: what `read_training_texts` reads. They are read once, however many items there are.
        n: letters of a gram.
    Raises:
        InputError: n is below 1, or a shard cannot be read.
    """
    if n < 1:
        raise InputError(f"contamination: n is {n}. Use at least 1 letter, or leave it out for {GRAM}.")
    index = GramIndex(texts, n)
    letters = 0
    for window in windows(read_training_texts(shards), index.longest_text):
        index.look_through(window)
        letters += window.new_letters
    return Contamination(n, tuple(os.fspath(path) for path in shards), letters, index.overlaps())
