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
        character = chr(code)
        folded = "" if character.isspace() else unicodedata.normalize("NFKC", character).casefold()
        self[code] = "".join(folded.split())
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
        places, at = [], self.folded.find(folded_mention)
        while at >= 0:
            start, end = self._starts.get(at), self._ends.get(at + len(folded_mention))
            if start is not None and end is not None:
                places.append((start, end))
            at = self.folded.find(folded_mention, at + 1)
        return places

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Of each character that is not left out: where it begins in `folded`, and which it is."""
        bounds, at = [], 0
        for index, character in enumerate(self.text):
            if width := len(fold(character)):
                bounds.append((at, index))
                at += width
        return bounds

    @cached_property
    def _starts(self) -> dict[int, int]:
        return dict(self._bounds)

    @cached_property
    def _ends(self) -> dict[int, int]:
        return {at + len(fold(self.text[index])): index + 1 for at, index in self._bounds}
