"""The report on comparisons: what was recognised, what is compared, what is wrong and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.data.check_conversations import Counting
from engine.data.check_preferences import PreferenceReport, are_preferences, check_preferences, render_preferences
from engine.data.preference_files import PreferenceOptions
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.engine.data.comparisons import comparisons, open_records
from tests.engine.data.dialogues import write
from tests.engine.data.test_groups import BAD, FAIR, GOOD, Q, pair, row
from tests.tools.in_child import run_tool

LIST = {"prompt": "咳嗽？", "responses": [{"text": "一" * size, "score": size} for size in (1, 2, 3)]}


def report(path: Path, counting: Counting | None = None, **options: Any) -> PreferenceReport:
    return check_preferences([str(path)], PreferenceOptions(**options), counting)


def counting(tokenizer: Tokenizer, context: int | None = None) -> Counting:
    return Counting(ChatTemplate.named("chimed", tokenizer), tokenizer, context)


def test_what_is_there_is_counted(tmp_path: Path) -> None:
    records = [
        *(pair(), pair(), pair(chosen=BAD, rejected=GOOD), LIST),
        *(row(1, "热敷吧", "腰疼？"), row(0, FAIR, "腰疼？"), row(0, FAIR, "腰疼？")),
    ]
    found = report(write(tmp_path / "a.jsonl", records))
    assert found.prompts == {2: 4, 3: 1}
    assert found.schemas == {"chosen > rejected": 3, "responses with grades": 1, "question = answer by label": 3}
    assert found.graded == 4
    # Three pairs of the list, one of each other prompt.
    assert found.pairs == 7
    # The list's better answers are longer, those of the pairs as long, that of the last prompt is shorter.
    assert found.longer == 3 + 3 / 2 + 0
    # A record, and a candidate; two records say GOOD > BAD, one says BAD > GOOD.
    assert (found.duplicates, found.repeated, found.contradicted) == (2, 2, 3)
    assert found.most == len(Q + GOOD) + len(Q + BAD)
    assert sorted(found.lengths.tolist())[:2] == [4, 5]


def test_faults_are_named_with_their_places(tmp_path: Path) -> None:
    records = [pair(rejected=GOOD), row(1, GOOD), row(1, BAD), {"a": 1}, pair("甲？"), row(1, GOOD, "乙？")]
    path = write(tmp_path / "a.jsonl", records)
    found = report(path)
    assert found.faults.total() == 4
    assert found.places["all N answers to this question have one grade"] == [
        f"{path}:2: all 2 answers to this question have one grade"
    ]
    assert found.places["this question has one answer"] == [f"{path}:6: this question has one answer"]
    page = render_preferences(found, None, "characters")
    assert f"e.g. {path}:1: the better and the worse answer are the same" in page
    assert "left out       4" in page
    with pytest.raises(InputError, match=r"a.jsonl:1: the better and the worse"):
        report(path, on_error="fail")


def test_report_agrees_with_what_is_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    history = [["第一问", "第一答" * 10], ["第二问", "第二答" * 10]]
    shortened, too_long = {**pair("长？"), "history": history}, pair("短？", rejected=BAD * 60)
    candidates = [row(place % 3, f"答{place}", f"问{place % 5}") for place in range(48)]
    records: list[Any] = [*comparisons(40), shortened, too_long, *candidates, row(1, GOOD, "独问")]
    groups = open_records(tmp_path / "1", records, tokenizer, context=64, max_responses=4)
    found = report(tmp_path / "1" / "raw.jsonl", counting(tokenizer, 64), max_responses=4)
    assert found.prompts.total() == groups.num_groups
    assert len(found.lengths) == groups.num_responses
    assert found.lengths.sum() == groups.num_tokens
    assert found.most == groups.most_tokens
    manifest, facts = groups.store.prepared[0].manifest, groups.store.facts
    assert found.faults.total() == manifest["rejected"] + facts.left_out > 0
    assert found.beyond_most == manifest["beyond_most"] + facts.beyond_most > 0
    assert found.shortened == manifest["shortened"] == 1


def test_held_out_questions_are_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(), pair("甲？")])
    other = write(tmp_path / "b.jsonl", [pair(f" {Q}", FAIR), pair("乙？")])
    found = check_preferences([str(path)], PreferenceOptions(), None, [str(other)])
    assert (found.held_out, found.overlap) == (2, 1)


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([pair()], True),
        ([LIST], True),
        ([row(1, GOOD), row(0, BAD)], True),
        # Conversations that happen to have a score are conversations.
        ([row(1, GOOD), row(0, BAD, "甲？")], False),
        ([{"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": GOOD}]}], False),
        ([{"text": Q}], False),
    ],
)
def test_comparisons_are_told_from_conversations(tmp_path: Path, records: list[Any], expected: bool) -> None:
    path = write(tmp_path / "a.jsonl", records)
    assert are_preferences([str(path)], PreferenceOptions()) == expected


def check_data(folder: Path, *words: object) -> str:
    (ended,) = run_tool("check_data", *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    return ended.stdout


def test_tool_finds_comparisons_and_shows_one(tmp_path: Path, tokenizer_directory: Path) -> None:
    path = write(tmp_path / "a.jsonl", [pair(), pair("甲？")])
    page = check_data(tmp_path, "--data", path, "--tokenizer", tokenizer_directory, "--context", 64)
    assert "prompts        2 with 4 answers (2: 2 by answers a prompt)" in page
    assert f"One record, {path}:1\n1: " in page
    assert f"⟦{GOOD}<eos>⟧" in page and f"⟦{BAD}<eos>⟧" in page
    assert "shortened      0 lose 0 oldest turns at 64 tokens" in page


def test_tool_takes_keys_of_comparisons(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"ask": Q, "up": GOOD, "down": BAD}])
    page = check_data(tmp_path, "--data", path, "--data.keys", "user=ask", "chosen=up", "rejected=down")
    assert f"user: {Q}\n1: {GOOD}\n0: {BAD}" in page
