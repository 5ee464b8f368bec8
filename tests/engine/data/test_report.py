"""Why records were left out, counted by kind and said in the words of the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.data.check_files import FilesReport
from engine.data.report import reject_reasons, without_numbers


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        ("turn 2 is empty", "turn 13 is empty", True),
        ("byte 4 of the line is not utf-8 (0xbb)", "byte 91 of the line is not utf-8 (0x80)", True),
        ("byte 4 of the line is not utf-8 (0xbb)", "byte 4 of the line is not gb18030 (0xbb)", False),
        ("not utf-8", "not utf-16", False),
    ],
)
def test_numbers_do_not_tell_reasons_apart_but_names_do(one: str, other: str, are_alike: bool) -> None:
    assert (without_numbers(one) == without_numbers(other)) == are_alike


def test_each_kind_of_reason_is_said_as_it_was_first_given(tmp_path: Path) -> None:
    reasons = ["turn 2 is empty", "byte 4 of the line is not utf-8 (0xbb)", "turn 13 is empty"]
    rejects = [{"file": "a.jsonl", "line": number, "reason": reason} for number, reason in enumerate(reasons, 3)]
    path = tmp_path / "rejects.jsonl"
    path.write_text("".join(json.dumps(reject) + "\n" for reject in rejects))
    assert reject_reasons(path) == [
        ("turn 2 is empty (first a.jsonl:3)", 2),
        ("byte 4 of the line is not utf-8 (0xbb) (first a.jsonl:4)", 1),
    ]


def test_a_place_may_have_no_line(tmp_path: Path) -> None:
    path = tmp_path / "left_out.jsonl"
    path.write_text(json.dumps({"file": "a.jsonl", "line": None, "reason": "all 3 answers have one grade"}))
    assert reject_reasons(path) == [("all 3 answers have one grade (first a.jsonl)", 1)]


def test_page_of_a_check_shows_real_numbers() -> None:
    report = FilesReport()
    report.fault("a.jsonl:3", "byte 4 of the line is not utf-8 (0xbb)")
    report.fault("a.jsonl:7", "byte 91 of the line is not utf-8 (0x80)")
    assert report.fault_rows("rejected")[:2] == [("rejected", "2"), ("", "2 x byte 4 of the line is not utf-8 (0xbb)")]
