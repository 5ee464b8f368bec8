"""All n-grams of test items, and what was found of them so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from evals.grams import BORDER, BORDER_LETTER, gram_numbers, letters_of
from evals.windows import Window

# Bits of the filter for every gram: of foreign grams one in so many gets past it.
_FILTER_BITS = 32
# A gram that more items share is boilerplate: it is found for all of them, but of them only the first ones' matches go
# on in it, so that work does not grow with the number of items that share it.
_MOST_PLACES = 64


@dataclass(frozen=True)
class Overlap:
    """What the training texts hold of one item.

    grams: n-grams of its texts, as often as they occur; 0 where every text is shorter than n letters, so that nothing
        could be looked for.
    found: those of them that stand in the training texts.
    longest: letters of the longest stretch of the item that stands in one place there; 0, or at least n.
    file, line: where that place is (`training_texts.Piece`); "" and 0 if nothing was found.
    """

    grams: int
    found: int
    longest: int = 0
    file: str = ""
    line: int = 0

    @property
    def share(self) -> float:
        """Of the grams that were found; 0 where there are none."""
        return self.found / self.grams if self.grams else 0.0


class GramIndex:
    """G different grams, in N places of the items' letters.

    Args:
        texts: of each item, by id.
        n: letters of a gram.
    """

    def __init__(self, texts: Mapping[str, Sequence[str]], n: int) -> None:
        self._n, self._names = n, list(texts)
        own = [[text.replace(BORDER, " ") for text in each] for each in texts.values()]
        self._letters = letters_of("".join(BORDER + text for each in own for text in each)).letters
        is_border = self._letters == BORDER_LETTER
        lengths = np.diff(np.append(np.flatnonzero(is_border), len(self._letters))) - 1
        self.longest_text = int(lengths.max(initial=0))
        """letters of it"""
        item_of_text = np.repeat(np.arange(len(own)), [len(each) for each in own])
        self._item = np.repeat(item_of_text, lengths + 1)  # of every letter
        borders = np.concatenate([[0], np.cumsum(is_border)])
        places = np.flatnonzero(borders[n:] == borders[:-n])  # where a gram lies within one text
        numbers = gram_numbers(self._letters, n)[places]
        order = np.argsort(numbers, kind="stable")
        self._places = places[order]  # int64 [N], gram by gram
        self._numbers, first = np.unique(numbers[order], return_index=True)  # uint64 [G], ascending
        self._first = np.append(first, len(places))  # int64 [G + 1], where in `_places` each begins
        self._is_found = np.zeros(len(self._numbers), np.bool_)
        self._longest: dict[int, tuple[int, str, int]] = {}  # by item
        bits = max(10, (_FILTER_BITS * len(self._numbers)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits - 3, np.uint8)
        np.bitwise_or.at(self._filter, *self._in_filter(self._numbers))

    def look_through(self, window: Window) -> None:
        """Note which grams stand in some training text."""
        numbers = gram_numbers(window.letters, self._n)
        byte, bit = self._in_filter(numbers)
        at = np.flatnonzero(self._filter[byte] & bit)  # int64, letters of the window where a known gram may begin
        gram = np.searchsorted(self._numbers, numbers[at])
        at, gram = _where(self._numbers.take(gram, mode="clip") == numbers[at], at, gram)
        if not len(at):
            return
        theirs, ours = sliding_window_view(window.letters, self._n), sliding_window_view(self._letters, self._n)
        at, gram = _where((theirs[at] == ours[self._places[self._first[gram]]]).all(axis=1), at, gram)
        self._is_found[gram] = True
        for length, item, begin in self._matches(at, gram) if len(at) else ():
            if length > self._longest.get(item, (0,))[0]:
                self._longest[item] = length, *window.locate(begin)

    def overlaps(self) -> dict[str, Overlap]:
        """By item."""
        owners = self._item[self._places]
        is_found = np.repeat(self._is_found, np.diff(self._first))
        grams = np.bincount(owners, minlength=len(self._names)).tolist()
        found = np.bincount(owners[is_found], minlength=len(self._names)).tolist()
        longest = (self._longest.get(item, ()) for item in range(len(self._names)))
        return {
            name: Overlap(*counts, *match)
            for name, counts, match in zip(self._names, zip(grams, found, strict=True), longest, strict=True)
        }

    def _in_filter(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Byte and bit of each number."""
        place = numbers >> self._shift
        return place >> np.uint64(3), np.uint8(1) << (place & np.uint64(7)).astype(np.uint8)

    def _matches(self, at: np.ndarray, gram: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """(letters, item, where in the window it begins) of stretches that a text and an item have in common.

        Args:
            at: int64 [H], ascending, where known grams begin; gram: int64 [H], which.
        """
        counts = np.minimum(self._first[gram + 1] - self._first[gram], _MOST_PLACES)
        begin = np.repeat(at, counts)
        rank = np.arange(len(begin)) - np.repeat(np.cumsum(counts) - counts, counts)
        place = self._places[np.repeat(self._first[gram], counts) + rank]
        # In a match both go on together: their distance stays the same.
        order = np.lexsort((begin, place - begin))
        begin, place = begin[order], place[order]
        ends = (np.diff(begin) != 1) | (np.diff(place) != 1)
        first = np.concatenate([[0], np.flatnonzero(ends) + 1])
        lengths = np.diff(np.append(first, len(begin))) + self._n - 1
        items = self._item[place[first]]
        # Only an item's longest is asked for; they come last.
        best = np.lexsort((lengths, items))
        is_last = np.append(np.diff(items[best]) != 0, True)
        chosen = best[is_last]
        yield from zip(lengths[chosen].tolist(), items[chosen].tolist(), begin[first[chosen]].tolist(), strict=True)


def _where(mask: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    return [array[mask] for array in arrays]
