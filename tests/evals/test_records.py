"""Records of test files, as they stand there."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from evals.records import listed, read_values
from model.errors import InputError


@pytest.mark.parametrize("takes_any", [False, True])
def test_records_keep_all_their_fields_and_their_lines(tmp_path: Path, takes_any: bool) -> None:
    records = [{"text": "头晕？", "more": [1, {"a": None}]}, {"other": "\ud800\0"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.csv").write_bytes("题,text\n甲,乙\n".encode("gb18030"))
    assert [*read_values(listed(tmp_path / "a.jsonl"), takes_any)] == [(1, records[0], ""), (3, records[1], "")]
    assert [value for _, value, _ in read_values(listed(tmp_path / "b.json"), takes_any)] == records
    assert [*read_values(listed(tmp_path / "c.csv"), takes_any)] == [(2, {"题": "甲", "text": "乙"}, "")]


def test_dates_of_parquet_are_texts(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.table({"text": ["甲"], "seen": [datetime.date(2020, 1, 2)]})
    parquet.write_table(rows, tmp_path / "a.parquet")
    assert [*read_values(listed(tmp_path / "a.parquet"))] == [(1, {"text": "甲", "seen": "2020-01-02"}, "")]


def test_what_is_no_object_is_a_record_only_where_anything_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n[2]\n{"a"\n')
    file = listed(tmp_path / "a.jsonl")
    broken = "broken JSON: Expecting ':' delimiter at character 5"
    assert [*read_values(file)][1:] == [(2, None, "a record is an object, this one is a list"), (3, None, broken)]
    assert [*read_values(file, takes_any=True)][1:] == [(2, [2], ""), (3, None, broken)]


def test_a_directory_in_the_place_of_a_file_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"this is a directory, and a file is wanted\. Name one"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.jsonl",
            "[1]",
            r"a\.jsonl:1: a record is an object, this one is a number\. Mend the record, or give a file",
        ),
        ("a.txt", "甲乙", r"a\.txt: a text has no records\. .* own format \(docs/evaluation\.md\)"),
        ("a.jsonl", None, "there is no such file"),
    ],
)
def test_a_file_without_records_is_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=said):
        [*read_values(listed(tmp_path / name))]
