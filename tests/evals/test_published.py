"""The published table: as it was printed, with the intervals that can be known."""

from __future__ import annotations

import pytest

from engine.intervals import wilson_interval
from evals.published import read_published, score


def test_table_has_nine_models_and_fifteen_columns() -> None:
    published = read_published()
    assert len(published.models) == 9 and len(published.columns) == 15
    assert {"ChiMed-GPT", "GPT-4", "Ziya-v2", "MedicalGPT (Z)"} <= set(published.models)


@pytest.mark.parametrize(
    ("column", "model", "percent"),
    [
        ("ccks2019", "GPT-4", 41.37),
        ("chimst", "MedicalGPT (Z)", 28.12),
        ("ceval", "ChiMed-GPT", 68.29),
        ("cmmlu", "Taiyi", 45.20),
        ("medqa", "MedicalGPT (Z)", 25.99),
        ("chimed_bleu_2", "GPT-3.5-Turbo", 32.85),
        ("chimed_rouge_l", "Ziya-v1", 12.66),
        ("mc_bleu_1", "Baichuan", 3.44),
        ("mc_rouge_2", "MedicalGPT (B)", 0.13),
        ("mc_rouge_l", "ChiMed-GPT", 42.16),
    ],
)
def test_scores_are_those_that_were_printed(column: str, model: str, percent: float) -> None:
    (found,) = (each for each in read_published().columns if each.id == column)
    assert found.scores[model].value == percent / 100


def test_share_of_41_questions_has_the_interval_of_41_questions() -> None:
    found = score(68.29, 41, "wilson")
    assert (found.low, found.high) == wilson_interval(28 / 41, 41)
    assert (round(found.low, 3), round(found.high, 3)) == (0.530, 0.804)  # type: ignore[arg-type]


def test_score_that_is_no_share_of_the_questions_has_no_interval() -> None:
    assert score(71.29, 41, "wilson").low is None  # 29 of 41 are 70.73, 30 are 73.17
    assert score(41.37, 200).low is None  # a micro-F1


def test_scores_of_ceval_and_cmmlu_are_shares_but_for_those_of_the_two_gpt() -> None:
    columns = {each.id: each for each in read_published().columns}
    without = {
        id: {model for model, found in columns[id].scores.items() if found.low is None}
        for id in ("ceval", "cmmlu", "medqa")
    }
    gpt = {"GPT-4", "GPT-3.5-Turbo"}
    assert without == {"ceval": gpt, "cmmlu": set(), "medqa": {"GPT-4", "Taiyi", "MedicalGPT (Z)"}}


def test_inflated_columns_stand_beside_the_paper_mode_alone() -> None:
    for column in read_published().columns:
        assert column.comparable in ("yes", "partly", "no") and column.note
        if column.metric.startswith(("BLEU", "ROUGE", "F1")):
            assert all(name.startswith("paper_") for names in column.beside.values() for name in names)
