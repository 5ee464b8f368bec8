"""The report on raw files, as a user asks for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.data.dialogues import write
from tests.tools.in_child import Ended, run_tool

Q, A = "头疼怎么办？", "先休息，多喝水，观察体温。"
TALK = {"question": Q, "answer": A}


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
