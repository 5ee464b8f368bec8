"""How alike an answer and its references are: BLEU and ROUGE on the tokens of `evals.characters`.

BLEU-n is the geometric mean of the precisions of 1- to n-grams times the brevity penalty (Papineni et al. 2002), as
sacrebleu defines it (Post 2018): of a corpus from sums over all answers, or of each answer and then the mean. Both are
`bleu` of the same statistics. ROUGE-1, -2 and -L are F1 (Lin 2004), as rouge-score defines them: of each answer, by the
reference that gives the most, and then the mean.

sacrebleu counts n-grams for BLEU, rouge-score for ROUGE-1 and -2. rouge-score fills the table of ROUGE-L cell by cell,
which for long answers takes twenty times as long as everything else, so that is `evals.lcs`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from itertools import islice
from typing import NamedTuple

import numpy as np

from evals.characters import Tokenizer
from evals.lcs import lcs_length
from model.errors import InputError

MAX_ORDER = 4
COLUMNS = 2 + 2 * MAX_ORDER
"""Of BLEU's statistics: tokens of the answer, of the reference of the nearest length, matching 1- to 4-grams, and 1- to
4-grams of the answer."""
ROUGE = ("rouge_1", "rouge_2", "rouge_l")


class AnswerScores(NamedTuple):
    """Of one answer. statistics: float [COLUMNS]; rouge: F1 in [0, 1], in the order of ROUGE."""

    tokens: list[str]
    statistics: np.ndarray
    rouge: tuple[float, float, float]


class TextScorer:
    """BLEU's statistics and ROUGE of answers.

    signature: what a number of BLEU or ROUGE must be quoted with; scores under different ones do not compare.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            InputError: a library is missing.
        """
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError:
            raise InputError(
                "Scoring texts needs sacrebleu and rouge-score. Install them: pip install -e '.[eval]'."
            ) from None
        self._tokenizer = tokenizer
        self._bleu = BLEU(tokenize="none", max_ngram_order=MAX_ORDER, effective_order=True, force=True)
        self._rouge = RougeScorer(["rouge1", "rouge2"], tokenizer=_Split())
        libraries = "|".join(f"{name}:{version(name)}" for name in ("sacrebleu", "rouge-score"))
        self.signature = (
            f"tok:{tokenizer.signature}|norm:nfkc|case:mixed|punct:kept|bleu:cumulative|smooth:exp|"
            f"eff:corpus=no,sentence=yes|rouge:f1,best-reference|{libraries}"
        )

    def score(self, answer: str, references: Sequence[str]) -> AnswerScores:
        """references: at least one."""
        tokens = self._tokenizer.tokenize(answer)
        wanted = [self._tokenizer.tokenize(reference) for reference in references]
        line, lines = " ".join(tokens), [" ".join(reference) for reference in wanted]
        counted = self._bleu.sentence_score(line, lines)
        rouge = self._rouge.score_multi(lines, line)
        return AnswerScores(
            tokens,
            np.array([counted.sys_len, counted.ref_len, *counted.counts, *counted.totals], dtype=np.float64),
            (
                float(rouge["rouge1"].fmeasure),
                float(rouge["rouge2"].fmeasure),
                max(rouge_l(tokens, reference) for reference in wanted),
            ),
        )


class _Split:
    """Takes tokens apart that were joined by spaces."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence in [0, 1]; 0 if either is empty."""
    if not answer or not reference:
        return 0.0
    return 2 * lcs_length(answer, reference) / (len(answer) + len(reference))


def bleu(statistics: np.ndarray, order: int, effective: bool) -> np.ndarray:
    """BLEU in [0, 1] of statistics, summed over a corpus or of single answers: [..., COLUMNS] -> [...].

    An order without a match counts 1 / (2^k total) for the k-th such order (smoothing "exp", that of mteval-v13a); BLEU
    is 0 where nothing matches at all. An answer too short for an order has BLEU 0, or if `effective` that of the orders
    for which it is long enough, as is usual for single answers.
    """
    answer, reference = statistics[..., 0], statistics[..., 1]
    matches = statistics[..., 2 : 2 + order]
    totals = statistics[..., 2 + MAX_ORDER : 2 + MAX_ORDER + order]
    with np.errstate(divide="ignore", invalid="ignore"):
        penalty = np.minimum(0.0, 1 - reference / np.maximum(answer, 1))  # its logarithm
        smoothing = 0.5 ** np.cumsum(matches == 0, axis=-1)
        logs = np.log(np.where(matches > 0, matches, smoothing) / totals)
    is_possible = totals > 0
    orders = is_possible.sum(-1) if effective else order
    logs = np.where(is_possible, logs, 0.0 if effective else -np.inf).sum(-1) / np.maximum(orders, 1)
    return np.where(matches.any(-1), np.exp(penalty + logs), 0.0)


def distinct(answers: Iterable[Sequence[str]], n: int) -> tuple[int, int]:
    """Different n-grams of all answers together, and n-grams in all (distinct-n is their ratio; Li et al. 2016)."""
    different: set[tuple[str, ...]] = set()
    in_all = 0
    for tokens in answers:
        different.update(zip(*(islice(tokens, start, None) for start in range(n)), strict=False))
        in_all += max(0, len(tokens) - n + 1)
    return len(different), in_all
