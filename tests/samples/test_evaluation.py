"""What models are evaluated on: nothing of it is in training, every key is right, every place of a mention exact."""

import json
from pathlib import Path

import pytest

from samples.bundle import bundled_evaluation
from samples.dialogues import Dialogue
from samples.evaluation import EvaluationFiles, render_evaluation
from samples.knowledge import Knowledge
from samples.render import Document, main
from tests.samples.conftest import Splits


@pytest.fixture(scope="module")
def files(knowledge: Knowledge) -> EvaluationFiles:
    return render_evaluation(knowledge)


def test_training_shows_no_question_no_note_and_no_first_turn_of_it(
    files: EvaluationFiles, dialogues: Splits[Dialogue], splits: Splits[Document]
) -> None:
    first_turns = {dialogue.question for dialogue in dialogues.train}
    shown = "\n".join([*first_turns, *(document.text for document in splits.train)])
    choices = {
        tuple(dialogue.question.split("\n")[1:2] + sorted(line[2:] for line in dialogue.question.split("\n")[3:]))
        for dialogue in dialogues.train
        if dialogue.kind == "choice"
    }
    for choice in files.choice:
        assert (f"问题：{choice.question}", *sorted(choice.option.values())) not in choices, choice.id
    for note in files.entities:
        assert note.text not in shown, note.id
    for talk in (*files.qa, *files.dialogue):
        assert next(turn.content for turn in talk.messages if turn.role == "user") not in first_turns, talk.id


def test_no_item_occurs_twice(files: EvaluationFiles) -> None:
    for items in vars(files).values():
        assert len({item.id for item in items}) == len(items)
    assert len({note.text for note in files.entities}) == len(files.entities)
    assert len({(one.question, *one.option.items()) for one in files.choice}) == len(files.choice)


def test_the_held_out_conversations_are_in_it(files: EvaluationFiles, dialogues: Splits[Dialogue]) -> None:
    held_out = {one.id: one for one in dialogues.held_out}
    items = {item.id: item for kind in vars(files).values() for item in kind}
    assert len(held_out.keys() & items.keys()) > 0.97 * len(held_out)  # the rest asks what another has asked
    for choice in files.choice:
        if choice.id in held_out:
            answer = f"{choice.answer}.{choice.option[choice.answer]}"
            assert answer == held_out[choice.id].messages[-1].content
            assert (
                choice.question in held_out[choice.id].question and choice.exam_subject in held_out[choice.id].question
            )
    for note in files.entities:
        if note.id in held_out and "疾病、" in held_out[note.id].question.split("\n")[0]:  # all of them are asked for
            listed = held_out[note.id].messages[-1].content.split("\n")
            assert sorted(listed) == sorted(f"{one.type}：{one.mention}" for one in note.entities)


def test_a_right_option_answers_by_the_facts_and_no_other_does(files: EvaluationFiles, knowledge: Knowledge) -> None:
    drugs = {drug.name: drug for drug in knowledge.drugs}
    groups = {trait.group: trait.id for trait in knowledge.traits}
    for choice in files.choice:
        condition = knowledge.condition(choice.id.split("/")[1])
        kind, right = choice.id.split("/")[-1], choice.option[choice.answer]
        if kind == "avoided":
            (trait,) = (groups[group] for group in groups if choice.question in _asking_whom_to_spare(group))
            fitting = {name for name in choice.option.values() if trait in drugs[name].avoid}
        elif kind == "drug":
            (therapy,) = (t for t in condition.therapies if drugs[right].id in t.drugs and t.purpose in choice.question)
            fitting = {name for name in choice.option.values() if drugs[name].id in therapy.drugs}
        else:
            complained = [set(one.symptoms) for one in knowledge.conditions if one is not condition]
            told = {symptom for symptom in condition.symptoms if symptom in choice.question}
            assert not any(told <= symptoms for symptoms in complained), choice.id
            fitting = {condition.department, condition.name} & set(choice.option.values())
        assert fitting == {right}, choice.id


def _asking_whom_to_spare(group: str) -> tuple[str, ...]:
    return f"{group}不宜用哪种药？", f"下列药物中，{group}应避用的是？", f"{group}禁用的药物是？"


def test_a_mention_stands_where_it_is_said_to_stand_and_none_is_left_out(
    files: EvaluationFiles, knowledge: Knowledge
) -> None:
    names = {
        "疾病": {one.name for one in knowledge.conditions},
        "症状": {symptom for one in knowledge.conditions for symptom in one.symptoms},
        "检查": {exam.name for one in knowledge.conditions for exam in one.examinations},
        "药物": {drug.name for drug in knowledge.drugs},
    }
    for note in files.entities:
        left, read = "", 0
        for one in note.entities:
            assert note.text[one.start : one.end] == one.mention and one.mention in names[one.type], note.id
            assert one.start >= read, note.id  # in the order of the text, none within another
            left, read = left + note.text[read : one.start] + "|", one.end
        left += note.text[read:]
        condition = knowledge.condition(note.id.split("/")[1])
        assert {one.type for one in note.entities} >= {"疾病", "症状", "检查"}, note.id
        for name in (*condition.symptoms, *(exam.name for exam in condition.examinations), condition.name):
            assert name not in left, note.id


def test_every_conversation_ends_with_an_answer_and_single_ones_are_kept_apart(files: EvaluationFiles) -> None:
    for talks, is_single in ((files.qa, True), (files.dialogue, False)):
        for talk in talks:
            roles = [turn.role for turn in talk.messages if turn.role != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and (len(roles) == 2) == is_single, talk.id


def test_half_of_each_subscale_is_worded_the_other_way_round(knowledge: Knowledge, tmp_path: Path) -> None:
    scale = json.loads((bundled_evaluation(tmp_path) / "attitudes.json").read_text(encoding="utf-8"))
    for subscale in {item["subscale"] for item in scale["items"]}:
        ways = [item["agreeing_is_stigma"] for item in scale["items"] if item["subscale"] == subscale]
        assert 2 * sum(ways) == len(ways) == 6


def test_the_command_writes_what_the_bundle_does_and_says_how_much(
    files: EvaluationFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "command")]) == 0
    printed = capsys.readouterr().out
    bundled = bundled_evaluation(tmp_path / "bundle")
    written = sorted(path.name for path in bundled.iterdir())
    assert written == ["attitudes.json", "choice.jsonl", "dialogue.jsonl", "entities.jsonl", "qa.jsonl"]
    modified = [path.stat().st_mtime_ns for path in sorted(bundled.iterdir())]
    bundled_evaluation(tmp_path / "bundle")
    assert [path.stat().st_mtime_ns for path in sorted(bundled.iterdir())] == modified  # left as they were
    for path in bundled.iterdir():
        assert path.read_bytes() == (tmp_path / "command" / "evaluation" / path.name).read_bytes()
    for name, items in vars(files).items():
        assert f"evaluation/{name}: {len(items)} items" in printed
        lines = (bundled / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["id"] for line in lines] == [item.id for item in items]
