"""Which option a free answer names, if it names one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from evals.attitude_orders import LETTERS

# A letter that is no part of a Latin word.
_LETTER = r"(?<![A-Za-z]){}(?![A-Za-z])"
# What is said to be not so: 不太同意 is no 同意, nor is 不选A an A.
_NOT_LETTER = re.compile(r"[不没未非别](?:[会能应该要])?(?:选择?|是)\s*$")
_NOT_WORDING = re.compile(r"[不没未非无难]\w{0,2}$")
_BETWEEN = re.compile(r"[\s.,:;、，。：；)）\]】”\"'*-]*")


def named_option(answer: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names; None where it names none, several, or contradicts itself.

    A letter that stands alone counts, as does the wording of an option; of wordings that contain each other, the longer
    one. A letter followed by the wording of another option is a contradiction. What is denied names none: of 不太同意
    nobody knows which degree it is.

    Args:
        options: as they were shown, under A, B, C, …
    """
    text = unicodedata.normalize("NFKC", answer)
    wordings = [unicodedata.normalize("NFKC", option) for option in options]
    letters = list(re.finditer(_LETTER.format(f"[{LETTERS[: len(options)]}]"), text))
    if any(_NOT_LETTER.search(text, 0, found.start()) for found in letters):
        return None
    if not letters:
        said = _said(text, wordings)
        return said.pop() if len(said) == 1 else None
    named = {LETTERS.index(found[0]) for found in letters}
    if len(named) > 1:
        return None
    for found in letters:
        behind = _BETWEEN.match(text, found.end())
        assert behind is not None
        begins = [place for place, wording in enumerate(wordings) if text.startswith(wording, behind.end())]
        if begins and max(begins, key=lambda place: len(wordings[place])) not in named:
            return None
    return named.pop()


def _said(text: str, wordings: Sequence[str]) -> set[int | None]:
    """The options whose wording is there, not counting where it is a part of a longer one; None for one denied."""
    longest_first = sorted(range(len(wordings)), key=lambda place: -len(wordings[place]))
    pattern = "|".join(re.escape(wordings[place]) for place in longest_first)
    return {
        None if _NOT_WORDING.search(text, 0, found.start()) else wordings.index(found[0])
        for found in re.finditer(pattern, text)
    }
