"""The report on raw files, as a user asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.chat import ChatTemplate, Message
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_tokenizer
from tests.engine.data.dialogues import write
from tests.tools.in_child import Ended, run_tool

Q, A = "头疼怎么办？", "先休息，多喝水，观察体温。"
TALK = {"question": Q, "answer": A}


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{number}、{Q}{A}" for number in range(60)], directory, vocab_size=305)
    return directory


def check(folder: Path, *words: object) -> Ended:
    (ended,) = run_tool("check_data", "--data", *words, cwd=folder)
    return ended


@pytest.mark.parametrize(
    ("good", "counted"),
    [
        ({"text": Q + A}, "documents   3\n"),
        (TALK, "conversations  3\n"),
        ({"prompt": Q, "chosen": A, "rejected": Q}, "prompts        3 with 6 answers"),
    ],
)
def test_unusable_files_are_all_named_and_others_still_counted(
    tmp_path: Path, good: dict[str, str], counted: str
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"%PDF-1.7\n")
    write(folder / "b.jsonl", [{"note": number} for number in range(3)])
    write(folder / "c.jsonl", [{name: f"{number}{text}" for name, text in good.items()} for number in range(3)])
    (folder / "d.json").write_text(json.dumps([good])[:-1])
    ended = check(tmp_path, folder)
    assert ended.code == 2
    assert counted in ended.stdout and ", 3 unusable\n" in ended.stdout
    *others, last = [line for line in ended.stderr.splitlines() if line.strip()]
    for name, reason in (("a.txt", "this is a PDF"), ("b.jsonl:1", 'this record has "note"'), ("d.json:1", "no end")):
        assert [line for line in others if line.startswith(str(folder / name)) and reason in line], ended.stderr
    assert last == "3 files cannot be read, for the reasons above. Mend them, or leave them out."


def test_without_any_usable_file_each_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"%PDF-1.7\n")
    (tmp_path / "b.csv").write_bytes(b"PK\x03\x04")
    ended = check(tmp_path, "a.txt", "b.csv")
    assert ended.code == 2 and not ended.stdout
    assert "a.txt: this is a PDF" in ended.stderr and "b.csv: this is a zip" in ended.stderr
    assert ended.last_line == "2 files cannot be read, for the reasons above. Mend them, or leave them out."


def test_held_out_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [TALK])
    write(tmp_path / "b.jsonl", [{"note": 1}])
    ended = check(tmp_path, "a.jsonl", "--held_out", "b.jsonl")
    assert ended.code == 2 and "conversations  1\n" in ended.stdout
    assert ended.last_line.startswith("b.jsonl:1: ")


QUESTIONS = [{"question": f"{number}、{Q}"} for number in range(3)]


@pytest.mark.parametrize(
    "records",
    [
        QUESTIONS,
        [{"messages": [{"role": "user", "content": each["question"]}]} for each in QUESTIONS],
        [{"prompt": each["question"]} for each in QUESTIONS],
    ],
)
def test_files_of_questions_alone_are_known_and_counted(
    tmp_path: Path, records: list[dict[str, object]], tokenizer_directory: Path
) -> None:
    write(tmp_path / "a.jsonl", [*records, records[0], {"note": 1}])
    ended = check(tmp_path, "a.jsonl", "--tokenizer", tokenizer_directory, "--template", "plain")
    assert ended.code == 0, ended.stderr
    assert "prompts        3 (1: 3 by questions a prompt)\n" in ended.stdout
    assert "duplicates     1 prompts repeat an earlier one" in ended.stdout
    assert "left out       1\n" in ended.stdout and "e.g. a.jsonl:5: " in ended.stdout
    tokenizer = Tokenizer.load(tokenizer_directory)
    template = ChatTemplate.named("plain", tokenizer)
    prompts = [template.encode_prompt(tokenizer, [Message("user", each["question"])]) for each in QUESTIONS]
    assert f"tokens         {sum(map(len, prompts))}\n" in ended.stdout
    assert f"longest {max(map(len, prompts))}\n" in ended.stdout
    assert f"One prompt, a.jsonl:1\n{tokenizer.decode(prompts[0])}" in ended.stdout


def test_prompts_are_counted_without_a_tokenizer_and_by_keys(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"ask": each["question"]} for each in QUESTIONS])
    write(tmp_path / "b.jsonl", [{"ask": QUESTIONS[0]["question"]}, {"ask": "别的？"}])
    ended = check(tmp_path, "a.jsonl", "--data.keys", "user=ask", "--held_out", "b.jsonl")
    assert ended.code == 0, ended.stderr
    assert "prompts        3" in ended.stdout and "Length in characters: median 8," in ended.stdout
    assert "held out       2, 1 of them with a question to be trained on" in ended.stdout


def test_what_has_answers_is_taken_for_prompts_where_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [TALK])
    (tmp_path / "b.txt").write_text(f"{Q}\n{A}\n")
    assert "conversations  1\n" in check(tmp_path, "a.jsonl").stdout
    assert "prompts        2 (1: 2 by" in check(tmp_path, "a.jsonl", "b.txt", "--kind", "prompts").stdout
    ended = check(tmp_path, "b.txt", "--kind", "prompts", "--data.encoding", "gbk")
    assert ended.code == 2 and ended.last_line.startswith("--data.encoding and --data.newlines are not for prompts")


def test_prompts_that_exceed_the_context_are_left_out_with_the_line(tmp_path: Path, tokenizer_directory: Path) -> None:
    write(tmp_path / "a.jsonl", [*QUESTIONS, {"question": Q * 40}])
    ended = check(tmp_path, "a.jsonl", "--tokenizer", tokenizer_directory, "--context", 64)
    assert ended.code == 0 and "prompts        3 (" in ended.stdout
    assert "left out       1\n" in ended.stdout and "e.g. a.jsonl:4: its last question takes " in ended.stdout
