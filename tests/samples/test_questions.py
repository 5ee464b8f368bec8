"""The keys agree with the facts, read anew from the questions' words; the score accepts right answers alone."""

import json
import re
from pathlib import Path

import pytest

from model.chat import Message
from samples.dialogues import Dialogue
from samples.knowledge import Knowledge
from samples.questions import (
    KINDS,
    Question,
    named,
    names_of,
    questions_of,
    score_answers,
    write_questions,
)
from tests.samples.conftest import Splits
from tests.samples.test_dialogues import condition_of, mentions, told_traits


@pytest.fixture(scope="module")
def questions(dialogues: Splits[Dialogue]) -> list[Question]:
    return questions_of(dialogues.held_out)


@pytest.fixture(scope="module")
def names(knowledge: Knowledge) -> dict[str, tuple[str, ...]]:
    return names_of(knowledge)


def test_there_are_enough_questions_of_both_kinds_each_asked_once(questions: list[Question]) -> None:
    for kind in KINDS:
        assert sum(question.kind == kind for question in questions) >= 80
    assert len({question.messages[-1].content for question in questions}) == len(questions)
    assert all(question.messages[-1].role == "user" and question.accepted for question in questions)


def test_a_department_is_right_when_its_condition_is_the_one_with_all_symptoms_asked_about(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    symptoms = {symptom for condition in knowledge.conditions for symptom in condition.symptoms}
    for question in questions_of(dialogues.all):
        if question.kind == "department":
            asked = mentions(question.messages[-1].content, symptoms)
            fitting = {c.department for c in knowledge.conditions if asked <= set(c.symptoms)}
            assert set(question.accepted) == fitting, question.id


def test_a_drug_is_right_when_it_serves_the_purpose_and_nothing_that_is_told_forbids_it(
    knowledge: Knowledge, dialogues: Splits[Dialogue]
) -> None:
    restricted = 0
    for dialogue in dialogues.all:
        if dialogue.kind == "drug":
            condition = condition_of(dialogue, knowledge)
            assert condition.name in dialogue.question
            (therapy,) = (t for t in condition.therapies if dialogue.id.split("/")[1].endswith(f".{t.purpose}"))
            assert therapy.purpose in dialogue.question
            told = told_traits(dialogue.question, knowledge) | set(condition.implies)
            drugs = [knowledge.drug(drug_id) for drug_id in therapy.drugs]
            assert set(dialogue.accepted) == {drug.name for drug in drugs if not told & set(drug.avoid)}, dialogue.id
            restricted += len(dialogue.accepted) < len(drugs)
    assert restricted > 100


def test_the_conversations_own_answers_are_all_right(
    dialogues: Splits[Dialogue], names: dict[str, tuple[str, ...]]
) -> None:
    by_id = {dialogue.id: dialogue.messages[-1].content for dialogue in dialogues.all}
    everything = questions_of(dialogues.all)
    for score in score_answers(everything, [by_id[question.id] for question in everything], names):
        assert score.right == score.count > 0


@pytest.fixture
def asked() -> list[Question]:
    user = (Message("user", "…"),)
    return [Question("a", "department", user, ("心内科",)), Question("b", "drug", user, ("缬沙坦", "氨氯地平"))]


@pytest.mark.parametrize(
    ("department", "drug", "verdict"),
    [
        ("建议挂心内科。", "可以用氨氯地平。", "right"),
        ("心内科，即心内科", "缬沙坦或氨氯地平都可以。", "right"),
        ("不用去骨科，请看心内科。", "高钾血症患者不宜用依那普利。可以用缬沙坦。", "right"),
        ("建议挂骨科。", "可以用依那普利。", "wrong"),
        ("心内科或骨科。", "缬沙坦或依那普利。", "wrong"),
        ("请看神经内科。", "缬沙坦胶囊与氢氯噻嗪合用。", "wrong"),
        ("请到医院就诊。", "请遵医嘱用药。", "silent"),
        ("不建议挂心内科。", "不能用缬沙坦。", "silent"),
        ("", "", "silent"),
    ],
)
def test_an_answer_is_right_when_it_names_what_is_accepted_and_nothing_else(
    department: str, drug: str, verdict: str, asked: list[Question], names: dict[str, tuple[str, ...]]
) -> None:
    for score in score_answers(asked, [department, drug], names):
        assert (score.right, score.wrong, score.silent) == tuple(
            int(verdict == word) for word in ("right", "wrong", "silent")
        )


def test_naming_everything_is_wrong(questions: list[Question], names: dict[str, tuple[str, ...]]) -> None:
    for score in score_answers(questions, ["、".join(names[question.kind]) for question in questions], names):
        assert score.wrong == score.count


def test_a_name_inside_a_longer_one_is_not_named() -> None:
    assert named("可以用阿莫西林克拉维酸钾", ("阿莫西林", "阿莫西林克拉维酸钾")) == {"阿莫西林克拉维酸钾"}


def test_chance_is_what_always_saying_each_name_in_turn_earns(
    questions: list[Question], names: dict[str, tuple[str, ...]]
) -> None:
    for index, kind in enumerate(KINDS):
        earned = []
        for name in names[kind]:
            score = score_answers(questions, [f"用{name}。"] * len(questions), names)[index]
            earned.append(score.right / score.count)
        assert score.chance == pytest.approx(sum(earned) / len(earned))


def test_a_score_says_its_interval_and_its_chance(asked: list[Question], names: dict[str, tuple[str, ...]]) -> None:
    department, drug = map(str, score_answers(asked, ["心内科", "不清楚"], names))
    assert re.fullmatch(r"Right department: 1 of 1 \(100%, 95% interval \d+% to 100%; chance 5\.3%\)", department)
    assert re.fullmatch(r"Right drug: 0 of 1 \(0%, 95% interval 0% to \d+%; chance 1\.4%\)", drug)


def test_written_questions_hold_their_keys(dialogues: Splits[Dialogue], tmp_path: Path) -> None:
    written = write_questions(tmp_path / "questions.jsonl", dialogues.held_out)
    records = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["accepted"] for record in records] == [list(question.accepted) for question in written]
    assert all(record["messages"][-1].keys() == {"role", "content"} for record in records)
