"""When two writings of a mention are the same, and where a text holds one.

Full-width letters and digits equal half-width ones, capitals equal small ones, and spaces do not count: each character
goes through Unicode's NFKC by itself and loses its case. Chinese texts mix all of these without meaning anything by it,
and so do annotators: a text says ct and its annotation CT.
"""

from __future__ import annotations

import unicodedata
from functools import cached_property


class _Folds(dict[int, str]):
    """What becomes of a character, found out when it is first met: for str.translate."""

    def __missing__(self, code: int) -> str:
        folded = unicodedata.normalize("NFKC", chr(code)).casefold()
        self[code] = "".join(folded.split())  # without spaces
        return self[code]


_FOLDS = _Folds()


def fold(text: str) -> str:
    """What two writings of the same mention have in common; "" of spaces alone."""
    return text.translate(_FOLDS)


class FoldedText:
    """A text in which mentions are looked for."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.folded = fold(text)

    def __contains__(self, folded_mention: str) -> bool:
        return folded_mention in self.folded

    def find(self, folded_mention: str) -> list[tuple[int, int]]:
        """Where a mention stands, in characters of the text itself, the end excluded; overlapping places too.

        A place that begins or ends inside a character, as mg in ㎎ may, is none.
        """
        assert folded_mention
        starts, ends = self._bounds
        places, at = [], self.folded.find(folded_mention)
        while at >= 0:
            start, end = starts.get(at), ends.get(at + len(folded_mention))
            if start is not None and end is not None:
                places.append((start, end))
            at = self.folded.find(folded_mention, at + 1)
        return places

    @cached_property
    def _bounds(self) -> tuple[dict[int, int], dict[int, int]]:
        """Where the text's characters begin and end: from places in `folded` to places in the text."""
        starts, ends, at = {}, {}, 0
        for index, code in enumerate(map(ord, self.text)):
            if width := len(_FOLDS[code]):
                starts[at] = index
                at += width
                ends[at] = index + 1
        return starts, ends
