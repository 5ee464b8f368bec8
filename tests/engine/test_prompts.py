"""Which records are questions, and what is asked by them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.prompts import read_prompts
from model.chat import Message
from model.errors import InputError

HELLO = "头晕怎么办？"


def prompts(path: Path, *records: object, keys: dict[str, str] | None = None) -> list[list[str]]:
    """Contents of the messages of each record; a refused one gives its reason alone."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_prompts(path, keys)
    return [[message.content for message in record.messages] or [f"refused: {record.reason}"] for record in found]


def test_an_answer_that_stands_there_is_dropped_and_one_that_does_not_is_no_fault(tmp_path: Path) -> None:
    records = [HELLO, {"prompt": HELLO}, {"question": HELLO, "answer": "多休息"}, {"question": HELLO, "answer": ""}]
    records += [{"instruction": HELLO}, {"q": HELLO}, {"ask": HELLO, "department": "内科"}, [HELLO, "多休息"], [HELLO]]
    records += [{"messages": [{"role": "user", "content": HELLO}]}]
    assert prompts(tmp_path / "a.jsonl", *records) == [[HELLO]] * len(records)
    history = {"query": "后来呢？", "history": [[HELLO, "多休息"]]}
    assert prompts(tmp_path / "b.jsonl", history) == [[HELLO, "多休息", "后来呢？"]]


def test_fields_that_are_named_are_asked_whatever_else_is_there(tmp_path: Path) -> None:
    record = {"question": "不是这个", "answer": "也不是", "题目": HELLO, "说明": "三天了"}
    assert prompts(tmp_path / "a.jsonl", record, keys={"user": "题目+说明"}) == [[f"{HELLO}\n三天了"]]
    turns = {"轮次": [{"谁": "用户", "话": HELLO}]}
    keys = {"turns": "轮次", "role": "谁", "content": "话"}
    assert prompts(tmp_path / "a.jsonl", turns, keys=keys) == [[HELLO]]


def test_a_reason_is_that_of_the_record_as_it_stands(tmp_path: Path) -> None:
    choice = {"question": HELLO, "options": {"A": "休息"}, "answer": "A"}
    refused = prompts(tmp_path / "a.jsonl", HELLO, choice, {"text": "一段"}, 5, {"question": "半\ud800个"})
    assert refused[1:] == [
        ['refused: it is a multiple-choice question; this record has "question", "options", "answer"'],
        ['refused: no conversation is known by these fields; this record has "text"; texts are for tools/pretrain.py'],
        ["refused: a record is an object, this one is a number"],
        ["refused: character 2 of the text is half a surrogate pair"],
    ]
    with pytest.raises(InputError, match=r"b.jsonl:1: .* Say which field asks with --data.keys user=FIELD"):
        prompts(tmp_path / "b.jsonl", {"题目": HELLO})


def test_tables_and_texts_hold_questions_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(f"department,ask\n内科,{HELLO}\n".encode("gbk"))
    (record,) = read_prompts(tmp_path / "a.csv")
    assert (record.line, record.fields) == (2, {"department": "内科", "ask": HELLO})
    assert record.messages == [Message("user", HELLO)]
    (tmp_path / "a.txt").write_text(f"{HELLO}\n\n咳嗽？\n")
    assert [(record.line, record.fields["prompt"]) for record in read_prompts(tmp_path / "a.txt")] == [
        (1, HELLO),
        (3, "咳嗽？"),
    ]
