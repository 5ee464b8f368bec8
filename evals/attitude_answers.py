"""Which option a free answer names, if it names one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from evals.attitude_orders import LETTERS

# A letter that is no part of a Latin word.
_LETTER = r"(?<![A-Za-z]){}(?![A-Za-z])"
_BETWEEN = re.compile(r"[\s.,:;、，。：；)）\]】”\"'*-]*")


def named_option(answer: str, options: Sequence[str]) -> int | None:
    """The place of the option that an answer names; None where it names none, several, or contradicts itself.

    A letter that stands alone counts, as does the wording of an option; of wordings that contain each other, the longer
    one. A letter followed by the wording of another option is a contradiction.

    Args:
        options: as they were shown, under A, B, C, …
    """
    text = unicodedata.normalize("NFKC", answer)
    wordings = [unicodedata.normalize("NFKC", option) for option in options]
    letters = list(re.finditer(_LETTER.format(f"[{LETTERS[: len(options)]}]"), text))
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


def _said(text: str, wordings: Sequence[str]) -> set[int]:
    """The options whose wording is there, not counting where it is a part of a longer one."""
    longest_first = sorted(range(len(wordings)), key=lambda place: -len(wordings[place]))
    pattern = "|".join(re.escape(wordings[place]) for place in longest_first)
    return {wordings.index(found[0]) for found in re.finditer(pattern, text)}
