"""ChiMed, Huatuo-26M, cMedQA2 and conversations become questions with references; the rest is counted or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.qa_files import read_chimed, read_cmedqa2, read_conversations, read_huatuo
from evals.questions import Question, Questions
from model.chat import Message
from model.errors import InputError


def write(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def asked(question: str) -> tuple[Message, ...]:
    return (Message("user", question),)


def page(question: str, first: str, second: str, adopted: tuple[str, str] = ("true", "false")) -> dict[str, str]:
    return {
        "question": question,
        **{"answer_1": first, "specialty_1": "内科", "adopted_1": adopted[0]},
        **{"answer_2": second, "specialty_2": "外科", "adopted_2": adopted[1]},
    }


@pytest.fixture
def chimed(tmp_path: Path) -> Path:
    pages = [
        page("头晕怎么办？", "多休息。", "测血压。"),
        page("牙痛？", "看牙科。", "", ("false", "false")),
        page("咳嗽？", "多喝水。补充问题：还有痰", "请打电话咨询。"),
    ]
    return write(tmp_path / "ChiMed.v1.test.json", pages)


def test_each_answer_of_a_chimed_page_is_a_question_of_its_own(chimed: Path) -> None:
    found = read_chimed(chimed)
    assert found.questions[:3] == (
        Question("1.1", asked("头晕怎么办？"), ("多休息。",), "内科"),
        Question("1.2", asked("头晕怎么办？"), ("测血压。",), "外科"),
        Question("2.1", asked("牙痛？"), ("看牙科。",), "内科"),
    )
    assert (len(found.questions), found.counts) == (5, {"without_answer": 1, "repeated": 2})


def test_both_answers_of_a_chimed_page_can_be_references(chimed: Path) -> None:
    found = read_chimed(chimed, "all")
    assert [question.references for question in found.questions][:2] == [("多休息。", "测血压。"), ("看牙科。",)]
    assert found.counts == {}


def test_adopted_answers_of_chimed_alone_can_be_references(chimed: Path) -> None:
    found = read_chimed(chimed, "adopted")
    assert [question.references[0][:2] for question in found.questions] == ["多休", "多喝"]
    assert found.counts == {"without_adopted_answer": 1}


def test_an_adopted_answer_is_shown_under_its_own_specialty(tmp_path: Path) -> None:
    pages = [
        page("头晕？", "多休息。", "测血压。", ("false", "true")),
        page("牙痛？", "看牙。", "漱口。", ("true", "true")),
    ]
    found = read_chimed(write(tmp_path / "pages.json", pages), "adopted")
    assert [(one.references[0], one.group) for one in found.questions] == [("测血压。", "外科"), ("看牙。", "内科")]


def test_pages_of_chimed_are_cleaned_as_for_the_published_figures(chimed: Path) -> None:
    with chimed.open("a", encoding="utf-8") as file:
        file.write(json.dumps(page("发热？提问人的追问：多少度", "吃药。", "休息。"), ensure_ascii=False))
    found = read_chimed(chimed, is_cleaned=True)
    assert [question.messages[0].content for question in found.questions] == ["头晕怎么办？"] * 2 + ["牙痛？"] + [
        "发热？"
    ] * 2
    assert found.counts == {"with_contacts": 1, "without_answer": 1, "repeated": 2}


@pytest.mark.parametrize(
    "record",
    [
        {"id": "", "instruction": ["头晕？"], "input": "", "output": ["多休息。"]},
        {"instruction": "头晕？", "input": "", "output": "多休息。"},
        {"questions": [["头晕？", "为什么头晕？"]], "answers": ["多休息。"]},
        {"questions": ["头晕？"], "answers": ["多休息。", "多休息。", " "]},
        {"question": "头晕？", "answer": "多休息。", "label": ""},
    ],
)
def test_every_form_of_huatuo_gives_the_same_question(tmp_path: Path, record: dict[str, Any]) -> None:
    assert read_huatuo(write(tmp_path / "test.jsonl", [record])).questions == (
        Question("1", asked("头晕？"), ("多休息。",)),
    )


def test_huatuo_as_one_list_with_several_answers_an_input_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    records = [
        {"instruction": "解释检查。", "input": "血压120/80", "output": ["正常。", "很好。"]},
        {"instruction": ["头晕？"], "input": "", "output": []},
        {"instruction": [], "input": "", "output": ["多休息。"]},
    ]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    found = read_huatuo(path)
    assert found.questions == (Question("2", asked("解释检查。\n血压120/80"), ("正常。", "很好。")),)
    assert found.counts == {"without_answer": 1, "without_question": 1}


@pytest.fixture
def cmedqa2(tmp_path: Path) -> Path:
    folder = tmp_path / "cMedQA2"
    folder.mkdir()
    (folder / "question.csv").write_text(
        'question_id,content\n10,头晕？\n11,"咳嗽，\n有痰？"\n12,牙痛？\n', encoding="utf-8"
    )
    (folder / "answer.csv").write_text(
        "ans_id,question_id,content\n1,10,多休息。\n2,10,测血压。\n3,11,多喝水。\n4,12, \n", encoding="utf-8"
    )
    (folder / "test_candidates.txt").write_text(
        "question_id,ans_id,cnt,label\n10,1,0,1\n10,3,1,0\n10,2,0,1\n11,3,0,1\n12,4,0,1\n", encoding="utf-8"
    )
    (folder / "train_candidates.txt").write_text(
        "question_id,pos_ans_id,neg_ans_id\n11,3,1\n11,3,2\n", encoding="utf-8"
    )
    return folder


def test_positive_candidates_of_cmedqa2_are_references(cmedqa2: Path) -> None:
    found = read_cmedqa2(cmedqa2)
    assert found.questions == (
        Question("10", asked("头晕？"), ("多休息。", "测血压。")),
        Question("11", asked("咳嗽，\n有痰？"), ("多喝水。",)),
    )
    assert found.counts == {"without_answer": 1}


def test_each_positive_candidate_of_cmedqa2_can_be_a_question_of_its_own(cmedqa2: Path) -> None:
    assert [question.id for question in read_cmedqa2(cmedqa2, "each").questions] == ["10.1", "10.2", "11.1"]


def test_training_candidates_of_cmedqa2_give_exemplars(cmedqa2: Path) -> None:
    (question,) = read_cmedqa2(cmedqa2 / "train_candidates.txt").questions
    assert (question.id, question.references) == ("11", ("多喝水。",))


def conversations(path: Path, keys: dict[str, list[str]] | None = None, system: str | None = None) -> Questions:
    return read_conversations(path, keys or {}, system)


def test_the_last_answer_of_a_conversation_is_its_reference(tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "甲乙丙丁", strict=True)]
    records = [
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "头晕？"}, {"from": "gpt", "value": "多休息。"}]},
        {"messages": turns[:3]},
        {"question": "头晕？"},
        ["牙痛？", "看牙科。"],
        {"messages": [{"role": "user", "content": "头晕？"}]},
    ]
    found = conversations(write(tmp_path / "chats.jsonl", records))
    said = (Message("user", "甲"), Message("assistant", "乙"), Message("user", "丙"))
    assert [(question.id, question.messages, question.references) for question in found.questions] == [
        ("1", said, ("丁",)),
        ("2", asked("头晕？"), ("多休息。",)),
        ("3", asked("甲"), ("乙",)),
        ("5", asked("牙痛？"), ("看牙科。",)),
    ]
    assert found.counts == {"no_conversation": 1, "without_answer": 1}
    assert found.notes[0].startswith(f"Records were left out that hold no conversation, the first at {tmp_path}")
    assert "chats.jsonl:4: no conversation is known by these fields" in found.notes[0]


def test_fields_and_a_system_prompt_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [{"ask": "头晕？", "reply": "多休息。"}])
    (question,) = conversations(path, {"user": ["ask"], "assistant": ["reply"]}, "你是医生。").questions
    assert question.messages == (Message("system", "你是医生。"), Message("user", "头晕？"))


def test_ids_name_the_file_where_there_are_several(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / "both" / name, [{"question": "头晕？", "answer": "多休息。"}])
    found = conversations(tmp_path / "both")
    assert [question.id for question in found.questions] == ["a.jsonl:1", "b.jsonl:1"]
    assert found.counts == {"repeated": 1}


def test_records_of_one_line_have_ids_of_their_own(tmp_path: Path) -> None:
    pages = [page("头晕？", "多休息。", "测血压。"), page("牙痛？", "看牙科。", "漱口。"), page("咳嗽？", "喝水。", "")]
    (tmp_path / "pages.json").write_text(json.dumps(pages), encoding="utf-8")
    each, together = (read_chimed(tmp_path / "pages.json", references) for references in ("each", "all"))
    assert [one.id for one in each.questions] == ["1.1", "1.2", "1.2.1", "1.2.2", "1.3.1"]
    assert [one.id for one in together.questions] == ["1", "1.2", "1.3"]


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path) -> None:
    records = [{"question": "头晕？", "answer": "休息。"}, {"question": "头晕\ud83d？", "answer": "休息。"}]
    path = tmp_path / "half.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for read in (read_huatuo, lambda path: read_conversations(path, {}, None)):
        with pytest.raises(InputError, match=r"half\.jsonl: question 2 holds half a surrogate pair"):
            read(path)


def test_the_fingerprint_is_of_the_questions_and_not_of_the_file(tmp_path: Path) -> None:
    record = {"question": "头晕？", "answer": "多休息。"}
    one, same = (write(tmp_path / name, [{**record, "more": name}]) for name in ("a.jsonl", "b.jsonl"))
    other = write(tmp_path / "c.jsonl", [{**record, "answer": "测血压。"}])
    prints = [conversations(path).fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "甲", "answer": "乙"}\n', '"answer_1" is missing; this record has "question", "answer"'),
        ("[1]\n", "a record is an object with named fields, this one is a number"),
        ('{"question": "甲"\n', "broken JSON"),
        (json.dumps(page("", "", "")) + "\n", "no question with an answer is in it; 1 records without question"),
        ("\n", "no question with an answer is in it. Give another file"),
    ],
)
def test_a_file_that_is_not_chimed_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "ChiMed.v1.test.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_chimed(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["question.csv", "answer.csv", "test_candidates.txt"])
def test_a_missing_file_of_cmedqa2_is_named(cmedqa2: Path, name: str) -> None:
    (cmedqa2 / name).unlink()
    with pytest.raises(InputError, match=f"{name}: there is no such file. cMedQA2 needs"):
        read_cmedqa2(cmedqa2)


def test_the_real_test_file_of_huatuo_holds_6000_questions(real_data: Path) -> None:
    found = read_huatuo(real_data / "qa" / "huatuo26m_test.json")
    assert (len(found.questions), found.counts) == (6000, {"repeated": 4})
    assert len({question.id for question in found.questions}) == 6000
