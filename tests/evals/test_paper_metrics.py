"""The published table's scores: nltk's BLEU and PyPI's ROUGE on spaced texts, quirks and all."""

from __future__ import annotations

import json
import random
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

from evals.paper_metrics import bleu, bleu_statistics, rouge, space_out
from tests.evals.record_rouge import PIECES, RECORDED

WEIGHTS = [(0.5, 0.5), (0.333, 0.333, 0.334)]


def test_characters_are_given_spaces_on_both_sides_and_words_are_not() -> None:
    assert space_out(" 头晕，0.5mg\n") == " 头  晕  ， 0.5mg"


def test_quotation_marks_and_dashes_count_as_chinese() -> None:
    """They fall into a range that the authors meant for rare characters; the first of the range does not."""
    assert space_out("a“b—c\u2001d\u2000e\u00b7f") == "a “ b — c \u2001 d\u2000e\u00b7f"


def by_nltk(cases: list[tuple[str, list[str]]]) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of orders without a match
        return corpus_bleu([references for _, references in cases], [answer for answer, _ in cases], weights=WEIGHTS)


def ours(cases: list[tuple[str, list[str]]]) -> list[float]:
    sums = np.sum([bleu_statistics(answer, references) for answer, references in cases], axis=0)
    return [float(bleu(sums, n)) for n in (2, 3)]


def drawn_text(draw: random.Random) -> str:
    return space_out("".join(draw.choices(PIECES, k=draw.choice((0, 1, 2, 5, 20)))))


def test_bleu_is_that_of_nltk_given_texts_for_lists_of_words() -> None:
    draw = random.Random(0)
    cases = [(drawn_text(draw), [drawn_text(draw) for _ in range(draw.randint(1, 3))]) for _ in range(1500)]
    assert ours(cases) == pytest.approx(by_nltk(cases), rel=1e-12)
    for start in range(0, len(cases), 3):
        few = cases[start : start + 3]
        assert ours(few) == pytest.approx(by_nltk(few), rel=1e-9), few


@pytest.mark.parametrize(
    "pair", [("", "甲"), ("甲", ""), ("", ""), ("a", "b"), ("a", "a"), ("ab", "ba"), ("abc", "bca"), ("a b", "b a")]
)
def test_bleu_of_very_short_texts_is_that_of_nltk(pair: tuple[str, str]) -> None:
    cases = [(pair[0], [pair[1]])]
    assert ours(cases) == pytest.approx(by_nltk(cases), rel=1e-9)


def test_bleu_of_real_texts_is_that_of_nltk(real_data: Path) -> None:
    records = json.loads((real_data / "qa" / "huatuo26m_test.json").read_text(encoding="utf-8"))[:301]
    texts = [space_out(record["output"][0]) for record in records]
    cases = [(answer, [reference]) for answer, reference in pairwise(texts)]
    assert ours(cases) == pytest.approx(by_nltk(cases), rel=1e-12)


def test_rouge_is_that_of_the_package() -> None:
    cases = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert sum(scores is None for _, _, scores in cases) > 5
    for answer, reference, scores in cases:
        assert list(rouge(space_out(answer), space_out(reference))) == (scores or [0.0, 0.0, 0.0]), (answer, reference)


def test_texts_without_a_character_in_common_share_the_spaces() -> None:
    """Of the 12 pieces of " 头  晕  乏  力 " 8 are spaces, and of its 11 pairs 3 are of spaces alone."""
    answer, reference = space_out("头晕乏力"), space_out("发热咳嗽")
    assert bleu_statistics(answer, [reference]).tolist() == [12, 12, 8, 3, 0, 12, 11, 10]
    assert float(bleu(bleu_statistics(answer, [reference]), 2)) == pytest.approx((8 / 12 * 3 / 11) ** 0.5)
    assert rouge(answer, reference) == (0.0, 0.0, 0.0)


def test_a_repeated_character_counts_once_in_rouge() -> None:
    assert rouge(space_out("痛痛痛痛"), space_out("痛"))[0] == pytest.approx(1.0, abs=1e-7)
