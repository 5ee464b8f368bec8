"""Texts as the letters that count when they are compared, and n-grams of these letters as 64-bit numbers.

Two texts are the same here if they differ in width, case, spaces, punctuation or symbols alone: NFKC, case folded, and
of that the letters, marks and numbers (Unicode categories L, M and N).

A gram's number is a polynomial over random 64-bit numbers, one a letter,

    h(c_0 ... c_{n-1}) = sum_j r(c_j) B^j  mod 2^64

so all grams of a text are a handful of passes over it: h over 2m letters is h over m of them, plus B^m times h over the
next m.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from typing import NamedTuple

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that no power of it is 0

BORDER = "\0"
"""Between two texts that are joined to be read in one go. It is kept, as a letter that no text has."""
BORDER_LETTER = 1


# How a code point becomes letters.
_ALONE, _SEVERAL, _TOGETHER = 0, 1, 2


class _Alphabet(NamedTuple):
    """For every code point.

    letter: uint32, what becomes of it; 0 where nothing does.
    kind: uint8, whether that is by itself; or becomes _SEVERAL letters; or depends on what stands beside it.
    number: uint64, r(c).
    several: finds the code points of that kind.
    """

    letter: np.ndarray
    kind: np.ndarray
    number: np.ndarray
    several: re.Pattern[str]


@functools.cache
def _alphabet() -> _Alphabet:
    points = sys.maxunicode + 1
    letter, kind = np.zeros(points, np.uint32), np.zeros(points, np.uint8)
    joining = _joining()
    for point in range(points):
        character = chr(point)
        category = unicodedata.category(character)
        is_selector = category == "Mn" and unicodedata.name(character).startswith("VARIATION SELECTOR")
        if category in ("Cn", "Co", "Cs") or is_selector:
            continue  # not assigned, private, half of a pair; or how another is drawn
        kept = [one for one in _plain(character) if unicodedata.category(one)[0] in "LMN"]
        if any(unicodedata.combining(one) or ord(one) in joining for one in _plain(character)):
            kind[point] = _TOGETHER
        elif len(kept) > 1:
            kind[point] = _SEVERAL
        if len(kept) == 1:
            letter[point] = ord(kept[0])
    letter[ord(BORDER)] = BORDER_LETTER
    number = np.random.default_rng(13).integers(0, 1 << 64, points, np.uint64)
    several = re.compile(f"[{''.join(map(chr, np.flatnonzero(kind == _SEVERAL)))}]")
    return _Alphabet(letter, kind, number, several)


def _joining() -> set[int]:
    """Code points that become one with the letter before them, though they are not called combining."""
    pairs = (unicodedata.decomposition(chr(point)).split() for point in range(sys.maxunicode + 1))
    seconds = {int(pair[1], 16) for pair in pairs if len(pair) == 2 and not pair[0].startswith("<")}
    return seconds | set(range(0x1160, 0x1200))  # Korean vowels and final consonants: by rule, not by table


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


class Letters(NamedTuple):
    """Of a text.

    letters: uint32 [L], code points.
    points: uint32 [P], of the text that they were taken from, normalised where it had to be.
    places: int64 [L], where in that text each stands.
    """

    letters: np.ndarray
    points: np.ndarray
    places: np.ndarray


def letters_of(text: str) -> Letters:
    """The letters of a text. Control characters are none, but stay among the points."""
    alphabet = _alphabet()
    points = _points(text)
    kind = alphabet.kind[points].max(initial=_ALONE)
    if kind == _TOGETHER:
        points = _points(_plain(text))
    elif kind == _SEVERAL:
        points = _points(alphabet.several.sub(lambda found: _plain(found[0]), text))
    letters = alphabet.letter[points]
    places = np.flatnonzero(letters)
    return Letters(letters[places], points, places)


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def gram_numbers(letters: np.ndarray, n: int) -> np.ndarray:
    """uint64 [L - n + 1], of the gram that begins at each letter; empty where there are fewer than n.

    Args:
        letters: uint32 [L], code points.
    """
    count = len(letters) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    power, width = _alphabet().number[letters], 1  # of grams of 1, 2, 4, ... letters
    total, done = np.zeros(count, np.uint64), 0
    while True:
        if n & width:
            total += power[done : done + count] * np.uint64(pow(_BASE, done, 1 << 64))
            done += width
        if done == n:
            return total
        power = power[:-width] + power[width:] * np.uint64(pow(_BASE, width, 1 << 64))
        width *= 2
