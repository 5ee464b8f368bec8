"""How like the full answer an answer is, where a question has no key but an answer that is known to be full.

    entities            F1 over the lines; a line that is repeated counts once as found and else as wrong
    a conversation      ROUGE-L over the characters: 2 LCS / (length of one + length of the other)

1 is the full answer itself; what is curt, wrong or long-winded is worth less. It is a rule for texts made of the
bundled phrases, as the true reward is.
"""

from __future__ import annotations

from collections import Counter

from evals.lcs import lcs_length

EXTRACTION = "entities"  # the kind whose answers are lines


def likeness(kind: str, full: str, answer: str) -> float:
    """0 to 1."""
    if kind == EXTRACTION:
        wanted, given = (Counter(line.strip() for line in text.split("\n") if line.strip()) for text in (full, answer))
        return 2 * (wanted & given).total() / max(1, wanted.total() + given.total())
    return 2 * lcs_length(full, answer) / max(1, len(full) + len(answer))
