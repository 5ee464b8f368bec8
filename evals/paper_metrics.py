"""The scores of ChiMed-GPT's published table as its authors compute them (IDEA-CCNL/Fengshenbang-LM, branch dev_bio,
generate.py and multi_turn_generate.py of ziya_llama2_13b_medical): to stand beside that table, and for nothing else.

Every Chinese character is given a space on either side. Then
- "BLEU-1" and "BLEU-2" are nltk's corpus_bleu of 2- and of 3-grams, given texts for lists of words. So its words are
  the characters of the spaced texts, two spaces between any two Chinese ones. Most n-grams hold spaces that match
  whatever the answer says; the figures are far above BLEU.
- ROUGE is the mean F1 of PyPI's `rouge` 1.0.1 on what is between the spaces. It cuts texts at full stops of ASCII, also
  that of 0.5, and counts each n-gram of a text once, also where it occurs often; its ROUGE-L takes the set of all
  tokens of the sentences' longest common subsequences.
An answer or reference of nothing but full stops has no ROUGE there, and the program ends; here it is 0.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from evals.lcs import common_subsequence

SIGNATURE = "paper:spaced-characters|bleu:nltk-corpus,2+3-grams,no-smoothing|rouge:1.0.1-f1,sets"
ORDERS = (2, 3)
"""Of the n-grams behind "BLEU-1" and "BLEU-2"."""
MAX_ORDER = 3
_WEIGHTS = {2: (0.5, 0.5), 3: (0.333, 0.333, 0.334)}

# The authors' ranges as Python reads them: two are meant for characters beyond U+FFFF, but are written as four digits
# and one character more, and so cover U+2001 to U+2A6D and U+2F81 to U+2FA1, quotation marks and dashes among them.
_CHINESE = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2eff\u2f00-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u33ff"
    "\u3400-\u4db5\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)


def space_out(text: str) -> str:
    """The text with a space before and behind each Chinese character."""
    return _CHINESE.sub(r" \1 ", text.strip())


def bleu_statistics(answer: str, references: Sequence[str]) -> np.ndarray:
    """What an answer adds to the corpus: its length, that of the nearest reference, matching 1- to 3-grams, and its own
    1- to 3-grams, at least 1 each: [8]. Texts are spaced; an n-gram is a piece of a text."""
    nearest = min((len(reference) for reference in references), key=lambda size: (abs(size - len(answer)), size))
    matches, totals = [], []
    for n in range(1, MAX_ORDER + 1):
        own = _pieces(answer, n)
        best: Counter[str] = Counter()
        for reference in references:
            best |= _pieces(reference, n)
        matches.append((own & best).total())
        totals.append(max(1, own.total()))
    return np.array([len(answer), nearest, *matches, *totals], dtype=np.float64)


def bleu(statistics: np.ndarray, order: int) -> np.ndarray:
    """nltk's corpus_bleu without smoothing, from sums over answers: [..., 8] -> [...]. 0 where no character matches; an
    order that alone has no match counts as the least positive number, so that the score is nearly 0."""
    answer, reference = statistics[..., 0], statistics[..., 1]
    matches = statistics[..., 2 : 2 + order]
    totals = statistics[..., 2 + MAX_ORDER : 2 + MAX_ORDER + order]
    penalty = np.minimum(0.0, 1 - reference / np.maximum(answer, 1))
    logs = np.log(np.where(matches > 0, matches / np.maximum(totals, 1), sys.float_info.min))
    return np.where(matches[..., 0] > 0, np.exp(penalty + logs @ np.array(_WEIGHTS[order])), 0.0)


def rouge(answer: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, -2 and -L of two spaced texts."""
    said, wanted = _sentences(answer), _sentences(reference)
    if not said or not wanted:
        return 0.0, 0.0, 0.0
    own, theirs = ([word for sentence in text for word in sentence] for text in (said, wanted))
    pairs, their_pairs = (set(pairwise(words)) for words in (own, theirs))
    common = {word for ours in said for sentence in wanted for word in common_subsequence(sentence, ours)}
    return (
        _f1(len(set(own) & set(theirs)), len(set(own)), len(set(theirs))),
        _f1(len(pairs & their_pairs), len(pairs), len(their_pairs)),
        _f1(len(common), len(set(own)), len(set(theirs))),
    )


def _pieces(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def _sentences(text: str) -> list[list[str]]:
    """Words between spaces of what stands between full stops; nothing but spaces is one empty word."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _f1(common: int, own: int, theirs: int) -> float:
    precision, recall = (common / size if size else 0.0 for size in (own, theirs))
    return 2 * precision * recall / (precision + recall + 1e-8)
