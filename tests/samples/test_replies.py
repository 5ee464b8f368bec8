"""Comparisons with a full answer: it is the best, the curt one and wrong ones stand beside it, graded by likeness."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samples.dialogues import Dialogue
from samples.knowledge import Knowledge
from samples.likeness import likeness
from samples.preferences import Comparison, render_preferences
from samples.questions import KINDS
from samples.replies import has_full_answer
from tests.samples.conftest import Splits

LIST = "疾病：痛风\n症状：关节红肿\n药物：秋水仙碱"


@pytest.fixture(scope="module")
def compared(knowledge: Knowledge) -> list[Comparison]:
    return [one for side in render_preferences(knowledge) for one in side if one.id.split("/")[0] not in KINDS]


@pytest.mark.parametrize(
    ("answer", "f1"),
    [
        (LIST, 1),
        ("药物：秋水仙碱\n症状：关节红肿\n疾病：痛风", 1),  # the order says nothing
        ("疾病：痛风\n药物：秋水仙碱", 4 / 5),
        ("疾病：痛风\n疾病：痛风\n药物：秋水仙碱", 4 / 6),  # the second time is wrong
        ("疾病：痛风\n症状：发热\n药物：秋水仙碱", 4 / 6),
        ("药物：痛风", 0),
        ("", 0),
    ],
)
def test_a_list_is_as_like_as_its_lines(answer: str, f1: float) -> None:
    assert likeness("entities", LIST, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("full", "answer", "rouge"),
    [
        ("应戒烟。", "应戒烟。", 1),
        ("应戒烟。", "戒烟", 2 * 2 / 6),
        ("应戒烟。", "多喝水", 0),
        ("应戒烟", "烟戒应", 2 / 6),
        ("应戒烟", "", 0),
    ],
)
def test_an_answer_is_as_like_as_its_longest_common_subsequence(full: str, answer: str, rouge: float) -> None:
    assert likeness("advice", full, answer) == pytest.approx(rouge)


@given(
    st.sampled_from(("entities", "advice")), st.text("疾病：痛风\n", max_size=12), st.text("疾病：痛风\n", max_size=12)
)
def test_nothing_is_liker_than_the_answer_itself(kind: str, full: str, answer: str) -> None:
    assert 0 <= likeness(kind, full, answer) <= 1
    assert likeness(kind, full, full) == float(bool(full.strip()) if kind == "entities" else bool(full))


def test_the_full_answer_is_the_best_and_no_other_is_as_good(
    compared: list[Comparison], dialogues: Splits[Dialogue]
) -> None:
    full = {dialogue.id: dialogue for dialogue in dialogues.all}
    assert len(compared) > 1400
    for one in compared:
        best, *rest = one.responses
        assert has_full_answer(full[one.id]) and (*one.prompt, full[one.id].messages[-1]) == full[one.id].messages
        assert best.text == full[one.id].messages[-1].content and best.score == 1
        assert rest and all(response.score < 1 for response in rest), one.id
        for response in one.responses:
            assert response.score == likeness(full[one.id].kind, best.text, response.text)


def test_curt_answers_and_wrong_ones_are_among_them(compared: list[Comparison], hurried: Splits[Dialogue]) -> None:
    curt = defaultdict(set)
    for dialogue in hurried.all:
        curt[dialogue.kind].add(dialogue.messages[-1].content)
    lists = [one for one in compared if one.id.startswith("entities/")]
    repeating = [r for one in lists for r in one.responses if len(set(r.text.split("\n"))) < r.text.count("\n") + 1]
    assert len(lists) > 300 and len(repeating) > 300
    talks = [one for one in compared if not one.id.startswith("entities/")]
    quick = [one for one in talks if {r.text for r in one.responses[1:]} & curt[one.id.split("/")[0]]]
    assert len(quick) > 0.7 * len(talks)
    assert all(len(one.responses) >= 2 for one in compared)
