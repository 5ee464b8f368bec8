"""BLEU and ROUGE are those of sacrebleu and rouge-score, on our tokens."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from evals.characters import CharacterTokenizer
from evals.text_metrics import COLUMNS, AnswerScores, TextScorer, bleu, distinct, rouge_l
from model.errors import InputError

ORDERS = (1, 2, 3, 4)
TOKENIZER = CharacterTokenizer()


@pytest.fixture(scope="module")
def scorer() -> TextScorer:
    return TextScorer(TOKENIZER)


def drawn_cases(count: int) -> list[tuple[str, list[str]]]:
    """Answers and one to three references, some empty, over few pieces so that much is repeated."""
    draw = random.Random(1)
    pieces = ["头", "晕", "头晕", "，", ",", "。", "0.5mg", "5 mg", "CT", "ct", " ", "每日２次", "\n", "“", "饭后"]

    def text() -> str:
        return "".join(draw.choices(pieces, k=draw.choice((0, 1, 2, 5, 12, 30))))

    return [(text(), [text() for _ in range(draw.randint(1, 3))]) for _ in range(count)]


def real_cases(folder: Path, count: int) -> list[tuple[str, list[str]]]:
    """Answers of doctors beside the answers to the next question, and with a part of the right one."""
    records = json.loads((folder / "qa" / "huatuo26m_test.json").read_text(encoding="utf-8"))[: count + 1]
    texts = [record["output"][0] for record in records]
    return [
        (other if number % 2 else right[: len(right) // 2] + other, [right])
        for number, (right, other) in enumerate(pairwise(texts))
    ]


def spaced(text: str) -> str:
    return " ".join(TOKENIZER.tokenize(text))


def check_against_libraries(scorer: TextScorer, cases: list[tuple[str, list[str]]]) -> None:
    scores = [scorer.score(answer, references) for answer, references in cases]
    statistics = np.stack([one.statistics for one in scores])
    answers = [spaced(answer) for answer, _ in cases]
    references = [[*map(spaced, given)] for _, given in cases]
    most = max(map(len, references))
    columns: list[Any] = [[given[n] if n < len(given) else None for given in references] for n in range(most)]
    for n in ORDERS:
        corpus = BLEU(tokenize="none", max_ngram_order=n, force=True).corpus_score(answers, columns).score
        assert float(bleu(statistics.sum(0), n, effective=False)) == pytest.approx(corpus / 100, rel=1e-12)
        sentence = BLEU(tokenize="none", max_ngram_order=n, effective_order=True)
        expected = [sentence.sentence_score(*pair).score / 100 for pair in zip(answers, references, strict=True)]
        np.testing.assert_allclose(bleu(statistics, n, effective=True), expected, rtol=1e-12)
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=TOKENIZER)
    for (answer, given), one in zip(cases, scores, strict=True):
        best = rouge.score_multi(given, answer)
        assert one.rouge == pytest.approx([best[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")], rel=1e-12)


def test_drawn_texts_score_what_the_libraries_say(scorer: TextScorer) -> None:
    check_against_libraries(scorer, drawn_cases(3000))


def test_real_texts_score_what_the_libraries_say(scorer: TextScorer, real_data: Path) -> None:
    check_against_libraries(scorer, real_cases(real_data, 500))


def test_corpora_without_a_match_of_some_order_are_smoothed_as_the_library_does(scorer: TextScorer) -> None:
    for answers, references in (
        (["头晕"], ["晕头"]),
        (["头晕乏力", "咳嗽"], ["乏力头晕", "嗽咳"]),
        (["头"], ["头"]),
        (["头"], ["晕"]),
        ([""], ["晕"]),
        (["晕"], [""]),
        ([""], [""]),
    ):
        pairs = zip(answers, references, strict=True)
        sums = np.sum([scorer.score(answer, [reference]).statistics for answer, reference in pairs], axis=0)
        for n in ORDERS:
            library = BLEU(tokenize="none", max_ngram_order=n, force=True)
            corpus = library.corpus_score([*map(spaced, answers)], [[*map(spaced, references)]]).score
            assert float(bleu(sums, n, effective=False)) == pytest.approx(corpus / 100, rel=1e-12), (answers, n)


def test_a_resample_of_statistics_scores_what_the_library_says_of_the_texts(scorer: TextScorer) -> None:
    cases, draw = drawn_cases(200), np.random.default_rng(3)
    statistics = np.stack([scorer.score(*case).statistics for case in cases])
    answers, references = [spaced(answer) for answer, _ in cases], [spaced(given[0]) for _, given in cases]
    first = np.stack([scorer.score(answer, given[:1]).statistics for answer, given in cases])
    assert not np.array_equal(statistics, first)
    for places in draw.integers(len(cases), size=(30, len(cases))):
        drawn = [answers[place] for place in places], [[references[place] for place in places]]
        for n in ORDERS:
            corpus = BLEU(tokenize="none", max_ngram_order=n, force=True).corpus_score(*drawn).score
            assert float(bleu(first[places].sum(0), n, effective=False)) == pytest.approx(corpus / 100, rel=1e-12)


def numbers(scores: AnswerScores) -> tuple[float, ...]:
    return (*(float(bleu(scores.statistics, n, effective=True)) for n in (1, 2, 4)), *scores.rouge)


def test_identical_texts_score_1_and_unlike_or_empty_ones_0(scorer: TextScorer) -> None:
    text = "布洛芬0.5mg，每日２次。"
    assert numbers(scorer.score(text, [text])) == (1.0,) * 6
    assert numbers(scorer.score("布洛芬 0.5 mg,每日2次。", [text])) == (1.0,) * 6  # narrow and full width are the same
    for answer, reference in (("", text), (text, ""), ("", ""), ("头孢", text)):
        assert numbers(scorer.score(answer, [reference])) == (0.0,) * 6


def test_a_hand_worked_answer(scorer: TextScorer) -> None:
    """每 日 2 次 beside 每 日 3 次: three of four tokens, one of three pairs; nothing is too short."""
    scores = scorer.score("每日2次", ["每日3次"])
    assert scores.tokens == ["每", "日", "2", "次"]
    assert scores.statistics.tolist() == [4, 4, 3, 1, 0, 0, 4, 3, 2, 1]
    assert scores.rouge == pytest.approx((0.75, 1 / 3, 0.75))
    assert float(bleu(scores.statistics, 1, effective=True)) == pytest.approx(0.75)
    assert float(bleu(scores.statistics, 2, effective=True)) == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    smoothed = (3 / 4 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** 0.25
    assert float(bleu(scores.statistics, 4, effective=True)) == pytest.approx(smoothed)


def test_a_wrong_dose_is_wrong_and_its_unit_right(scorer: TextScorer) -> None:
    assert scorer.score("5mg", ["0.5mg"]).rouge[0] == pytest.approx(0.5)


def test_repeating_a_character_of_the_reference_earns_it_once(scorer: TextScorer) -> None:
    """痛 痛 痛 痛 beside 痛: precision 1 / 4, recall 1."""
    scores = scorer.score("痛痛痛痛", ["痛"])
    assert float(bleu(scores.statistics, 1, effective=True)) == pytest.approx(0.25)
    assert scores.rouge == pytest.approx((0.4, 0.0, 0.4))


def test_a_short_answer_pays_for_its_brevity(scorer: TextScorer) -> None:
    assert float(bleu(scorer.score("头晕", ["头晕乏力"]).statistics, 1, effective=True)) == pytest.approx(np.exp(1 - 2))


def test_of_several_references_the_nearest_counts_for_length_and_the_best_for_rouge(scorer: TextScorer) -> None:
    scores = scorer.score("头晕乏力", ["头晕", "头晕乏力恶心呕吐", "乏力"])
    assert scores.statistics[:3].tolist() == [4, 2, 4]  # both are two away: the shorter one
    assert scores.rouge[0] == pytest.approx(2 / 3)


def test_drawn_tokens_score_what_chance_gives() -> None:
    """Answers and references of one token out of four: a match with probability 1 / 4, in all scores of one token."""
    draw, n = random.Random(2), 4000
    scorer = TextScorer(TOKENIZER)
    scores = [scorer.score(draw.choice("甲乙丙丁"), [draw.choice("甲乙丙丁")]) for _ in range(n)]
    within = 4 * (1 / 4 * 3 / 4 / n) ** 0.5  # four standard errors of a proportion
    assert float(bleu(np.sum([one.statistics for one in scores], 0), 1, False)) == pytest.approx(0.25, abs=within)
    assert np.mean([one.rouge[0] for one in scores]) == pytest.approx(0.25, abs=within)
    assert np.mean([one.rouge[2] for one in scores]) == pytest.approx(0.25, abs=within)


def test_rouge_l_is_in_order(scorer: TextScorer) -> None:
    assert rouge_l("甲乙丙丁", "丁丙乙甲") == pytest.approx(0.25)


def test_bleu_of_many_sums_at_once_is_that_of_each(scorer: TextScorer) -> None:
    sums = np.stack([scorer.score(*case).statistics for case in drawn_cases(60)]).reshape(3, 20, COLUMNS)
    for n in ORDERS:
        each = [[float(bleu(row, n, effective=False)) for row in block] for block in sums]
        np.testing.assert_array_equal(bleu(sums, n, effective=False), each)


def test_distinct_counts_n_grams_of_all_answers_together() -> None:
    answers = [["头", "晕", "头", "晕"], ["头", "晕"], []]
    assert distinct(answers, 1) == (2, 6)
    assert distinct(answers, 2) == (2, 4)
    assert distinct(answers, 3) == (2, 2)
    assert distinct([["头"]], 2) == (0, 0)


def test_the_signature_names_whatever_decides_the_numbers(scorer: TextScorer) -> None:
    for part in ("tok:char", "norm:nfkc", "case:mixed", "smooth:exp", "sacrebleu:", "rouge-score:0."):
        assert part in scorer.signature


def test_without_the_libraries_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(InputError, match=r"needs sacrebleu and rouge-score. Install them: pip install -e '.\[eval\]'"):
        TextScorer(TOKENIZER)
