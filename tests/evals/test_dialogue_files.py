"""MC's dialogues become questions whose answer is the doctor's last turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.dialogue_files import read_dialogues
from evals.questions import Question
from model.chat import Message
from model.errors import InputError

DIALOGUE = """\
id\t7\tdepartment\t内科\tdisease\t胃炎
P\t胃痛。\t1
P\t三天了。\t0
D\t吃过什么？\t0
P\t海鲜。\t0
D\t先禁食。\t2
D\t不好再来。\t2
P\t谢谢。\t0
SUM1\t胃痛三天。
SUM2.0\t禁食。
"""


def write(path: Path, *dialogues: str) -> Path:
    path.write_text("\n".join(dialogues), encoding="utf-8")
    return path


def test_lines_of_one_speaker_are_one_turn_and_the_last_of_the_doctor_is_the_reference(tmp_path: Path) -> None:
    found = read_dialogues(write(tmp_path / "test.dialog", DIALOGUE))
    turns = (Message("user", "胃痛。\n三天了。"), Message("assistant", "吃过什么？"), Message("user", "海鲜。"))
    assert found.questions == (Question("1", turns, ("先禁食。\n不好再来。",), "内科"),)
    assert found.counts == {}


def test_the_misspelt_header_of_the_published_test_file_is_known(tmp_path: Path) -> None:
    path = write(tmp_path / "test.dialog", DIALOGUE, DIALOGUE.replace("department", "apartment").replace("\n", "\r\n"))
    first, second = read_dialogues(path).questions
    assert (first.group, second.group, second.id) == ("内科", "内科", "12")
    assert second.messages == first.messages


def test_dialogues_in_which_no_doctor_answers_are_counted(tmp_path: Path) -> None:
    silent = "id\t8\tdepartment\t内科\tdisease\t-\nP\t有人吗？\t0\n"
    unasked = "id\t9\tdepartment\t内科\tdisease\t-\nD\t你好。\t0\n"
    opened = "id\t10\tdepartment\t外科\tdisease\t-\nD\t你好。\t0\nP\t腰痛。\t1\nD\t \t0\nD\t拍片。\t2\n"
    found = read_dialogues(write(tmp_path / "test.dialog", silent, unasked, DIALOGUE, opened))
    assert found.counts == {"without_doctor_answer": 2, "opened_by_doctor": 2}
    assert found.questions[1].messages == (Message("user", "腰痛。"),)
    assert found.questions[1].references == ("拍片。",)


def test_repeated_dialogues_stay_and_are_counted(tmp_path: Path) -> None:
    found = read_dialogues(write(tmp_path / "test.dialog", DIALOGUE, DIALOGUE))
    assert ([question.id for question in found.questions], found.counts) == (["1", "12"], {"repeated": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("P\t胃痛。\t1\n", "test.dialog:1: a dialogue begins with a line of id"),
        (DIALOGUE + "X\t?\n", "test.dialog:11: a line begins with P, D or SUM and a TAB, this one with 'X'"),
        (DIALOGUE + "P\n", "test.dialog:11: a line begins with P, D or SUM and a TAB, this one with 'P'"),
        ("id\t8\n", "test.dialog: no question with an answer is in it; 1 records without doctor answer"),
        ("", "test.dialog: no question with an answer is in it. Give another file"),
    ],
)
def test_a_file_that_is_no_dialogue_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_dialogues(write(tmp_path / "test.dialog", content))


def test_the_real_files_hold_18_dialogues_and_360(real_data: Path) -> None:
    test, train = (read_dialogues(real_data / "dialogue" / f"hetmc_{split}.dialog") for split in ("test", "train"))
    assert (len(test.questions), test.counts) == (18, {})
    assert (len(train.questions), train.counts) == (360, {"repeated": 324})
    for question in (*test.questions, *train.questions):
        roles = [message.role for message in question.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert question.group
