"""Training texts as windows of letters, large enough for arrays to be worth their while, whatever a record's size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from evals.grams import BORDER, BORDER_LETTER, letters_of
from evals.training_texts import Piece

# Characters of a window: the numbers of its grams stay in a processor's cache.
CHARACTERS = 1 << 18
_MORE = "\1"  # stands where a text goes on with the next piece; no letter


class Window:
    """Some pieces of text, end to end.

    letters: uint32 [L], with a border before every text.
    """

    def __init__(self, pieces: Sequence[Piece], repeated: int = 0) -> None:
        """`repeated`: how many letters at the beginning were in the window before."""
        marked = ((BORDER if piece.is_first else _MORE) + _unmarked(piece.text) for piece in pieces)
        self.letters, self._points, self._places = letters_of("".join(marked))
        self._starts = np.flatnonzero(self._points <= ord(_MORE))
        self._pieces = pieces
        self._repeated = repeated

    @property
    def new_letters(self) -> int:
        """Letters that no window had before."""
        return int((self.letters != BORDER_LETTER).sum()) - self._repeated

    def locate(self, letter: int) -> tuple[str, int]:
        """File and line of a letter."""
        piece, line, _ = self._find(letter)
        return piece.file, line

    def tail(self, count: int) -> tuple[Piece, int]:
        """The last letters of the last text, as a piece, and how many they are: at most `count`."""
        borders = np.flatnonzero(self.letters == BORDER_LETTER)
        begin = max(len(self.letters) - count, int(borders[-1]) + 1 if len(borders) else 0)
        if begin >= len(self.letters):
            return self._pieces[-1]._replace(text=""), 0
        piece, line, point = self._find(begin)
        text = self._points[point:].tobytes().decode("utf-32-le", "surrogatepass").replace(_MORE, "")
        return Piece(piece.file, line, text, is_first=False, has_lines=piece.has_lines), len(self.letters) - begin

    def _find(self, letter: int) -> tuple[Piece, int, int]:
        """Of a letter its piece, its line, and its place among the points."""
        place = int(self._places[letter])
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        piece = self._pieces[number]
        before = self._points[self._starts[number] : place]
        return piece, piece.line + (int((before == ord("\n")).sum()) if piece.has_lines else 0), place


def windows(pieces: Iterable[Piece], overlap: int) -> Iterator[Window]:
    """Pieces as windows; any `overlap` letters in a row of one text are together in one of them."""
    gathered: list[Piece] = []
    characters, repeated = 0, 0
    for piece in pieces:
        if piece.is_first and not characters:  # nothing goes on into this window
            gathered, repeated = [], 0
        gathered.append(piece)
        characters += len(piece.text)
        if characters >= CHARACTERS:
            window = Window(gathered, repeated)
            yield window
            tail, repeated = window.tail(overlap - 1)
            gathered, characters = [tail], 0
    if characters:
        yield Window(gathered, repeated)


def _unmarked(text: str) -> str:
    return text.replace(BORDER, " ").replace(_MORE, " ")
