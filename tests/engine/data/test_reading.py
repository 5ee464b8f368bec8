from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import encodings, read_json, read_tables, read_text
from engine.data.reading import read_records
from engine.data.records import SourceFile, TextSchema
from engine.data.sources import ReadOptions, list_files, probe, read_texts
from model.errors import InputError

TEXTS = [
    "高血压患者应低盐饮食，并按时服药。",
    "感冒\n多饮水；\r\n  注意休息。\n",
    'He said: “rest”, \t\\ "quoted", 逗号,',
]


def read(path: Path, **options: Any) -> list[str]:
    return list(read_texts([str(path)], ReadOptions(min_characters=1, **options)))


def records(path: Path, **options: Any) -> list[tuple[int, str | None, str]]:
    settings = ReadOptions(min_characters=1, **options)
    file = probe(list_files([str(path)]).files[0], settings)
    return [(record.line, record.text, record.reason) for record in read_records(file, settings.schema)]


def as_csv(texts: list[str]) -> bytes:
    page = io.StringIO(newline="")
    writer = csv.writer(page)
    writer.writerow(["id", "text"])
    writer.writerows((number, text) for number, text in enumerate(texts))
    return page.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=2)
    return sink.getvalue()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "jsonl": lambda texts: "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode(),
    "json": lambda texts: json.dumps([{"id": 1, "content": t} for t in texts], indent=1).encode(),
    "strings.json": lambda texts: json.dumps(texts, ensure_ascii=False).encode(),
    "lines.json": lambda texts: "\n".join(json.dumps(t) for t in texts).encode(),
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_texts_exactly(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(WRITERS[kind](TEXTS))
    assert read(path) == TEXTS


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "parquet"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gb18030"])
def test_every_format_is_read_in_every_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    path = tmp_path / f"a.{kind}"
    texts = [text + "病人" * 20 for text in TEXTS]
    path.write_bytes(WRITERS[kind](texts).decode().encode(encoding))
    assert read(path) == texts


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_files_are_read(tmp_path: Path, kind: str) -> None:
    content = WRITERS[kind](TEXTS)
    (tmp_path / f"a.{kind}.gz").write_bytes(gzip.compress(content))
    # Two frames end to end are one file.
    half = len(content) // 2
    (tmp_path / f"b.{kind}.zst").write_bytes(zstandard.compress(content[:half]) + zstandard.compress(content[half:]))
    assert read(tmp_path) == TEXTS + TEXTS


def test_text_file_is_one_document_with_every_character(tmp_path: Path) -> None:
    content = "  第一章\r\n\r\n\u3000\u3000论述。\rx\u2028y\x0c\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert read(tmp_path / "a.txt") == [content]


def test_newlines_become_unix_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read(tmp_path / "a.txt", newlines="unix") == ["one\ntwo\nthree\n"]


def test_lines_are_documents_without_their_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("第一\r\n\n  \n第二\u2028行\n第三".encode())
    assert read(tmp_path / "a.txt", document="line") == ["第一", "第二\u2028行", "第三"]


def test_paragraphs_end_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("一\n二\r\n\n \t\r\n\n三\n".encode())
    assert read(tmp_path / "a.txt", document="paragraph") == ["一\n二", "三"]


def test_large_text_files_are_collections_of_paragraphs_or_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.sources.BOOK_BYTES", 1000)
    monkeypatch.setattr("engine.data.sources.SAMPLE_BYTES", 1000)
    (tmp_path / "lines.txt").write_text("one line\n" * 200)
    (tmp_path / "paragraphs.txt").write_text("one\ntwo\n\n" * 200)
    (tmp_path / "book.txt").write_text("one\ntwo\n\n" * 20)
    assert read(tmp_path / "lines.txt") == ["one line"] * 200
    assert read(tmp_path / "paragraphs.txt") == ["one\ntwo"] * 200
    assert len(read(tmp_path / "book.txt")) == 1


def test_long_document_is_divided_at_lines_and_loses_nothing(tmp_path: Path) -> None:
    content = "".join(f"第{number}行的内容\n" for number in range(1000))
    for name, document in (("a.txt", content), ("a.json", json.dumps([content]))):
        (tmp_path / name).write_text(document)
        pieces = read(tmp_path / name, max_characters=1000)
        assert "".join(pieces) == content
        assert all(len(piece) <= 1000 and piece.endswith("\n") for piece in pieces)


def test_one_endless_line_is_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_text, "SAMPLE_BYTES", 100)
    content = "无" * 5000
    (tmp_path / "a.txt").write_text(content)
    for document in ("file", "line", "paragraph"):
        pieces = read(tmp_path / "a.txt", document=document, max_characters=1000)
        assert "".join(pieces) == content and {len(piece) for piece in pieces} == {1000}


def test_bad_lines_cost_one_record_each_and_name_their_line(tmp_path: Path) -> None:
    good = json.dumps({"text": "病历"}).encode()
    bad = [b'{"text": "a"', b'{"text": 5}', b'{"title": "x"}', b'["text"]', b'{"text": "\xff"}', b'{"text": "\\ud800"}']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good, *bad, b"", good]))
    found = records(path, encoding="utf-8")
    assert [line for line, text, _ in found if text == "病历"] == [1, 9]
    reasons = {line: reason for line, text, reason in found if text is None}
    assert [*reasons] == [2, 3, 4, 5, 6]
    assert "broken JSON" in reasons[2] and '"text" is a number' in reasons[3] and '"title"' in reasons[4]
    assert "a list" in reasons[5] and "not utf-8 (0xff)" in reasons[6]
    assert read(path, encoding="utf-8") == ["病历", "病历"]  # the half surrogate is refused as well
    with pytest.raises(InputError, match=r"a\.jsonl:2: broken JSON"):
        read(path, encoding="utf-8", on_error="fail")


def test_bad_table_rows_cost_one_record_each(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('id,text\n1,"甲\n乙"\n2,a,b\n3,"x"y\n4,'.encode() + b"\xff\n5," + "丙\n".encode())
    found = records(path, encoding="utf-8")
    assert [(line, text) for line, text, _ in found] == [(2, "甲\n乙"), (4, None), (5, None), (6, "\udcff"), (7, "丙")]
    assert read(path, encoding="utf-8") == ["甲\n乙", "丙"]


@pytest.mark.parametrize("row", [4, 200, 1000])
def test_a_quote_that_is_never_closed_costs_its_line(tmp_path: Path, row: int) -> None:
    lines = ["id,text", *(f"{number},第{number}份病历" for number in range(2, 1001))]
    lines[row - 1] = f'"{row},咳嗽'
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    found = records(path)
    assert [line for line, _, _ in found] == [*range(2, 1001)]
    assert [(line, reason) for line, text, reason in found if text is None] == [
        (row, "broken table row: a quote is opened and never closed")
    ]
    assert all(text == f"第{line}份病历" for line, text, _ in found if line != row)


def test_a_quote_that_is_closed_rows_later_costs_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,text,note\n"2,咳嗽,\n3,发热,\n4,"头\n痛",见\n6,直径12",\n7,腹泻,""\n')
    assert [(line, text) for line, text, _ in records(path)] == [
        (2, None),  # joined with rows 3 and 4 it ends in the middle of a word
        (3, "发热"),
        (4, "头\n痛"),
        (6, '直径12"'),
        (7, "腹泻"),
    ]


def test_a_table_row_longer_than_any_record_costs_its_first_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_tables, "LONGEST_RECORD", 100)
    monkeypatch.setattr(read_tables, "SAMPLE_BYTES", 64)
    path = tmp_path / "a.csv"
    exact = "4," + "x" * 97
    rows = ["id,text", '2,"open', *(f"{number},{'x' * 40}" for number in (3, 4)), exact, exact + "x", "x" * 500]
    path.write_text("\n".join([*rows, '8,"a\nb"', "x" * 300]))
    assert [(line, text is None) for line, text, _ in records(path)] == [
        *((2, True), (3, False), (4, False), (5, False), (6, True), (7, True), (8, False), (10, True))
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text('a"\n\r,病', max_size=8), max_size=12), st.integers(20, 60))
def test_every_line_of_any_table_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, fields: list[str], longest: int
) -> None:
    path = tmp_path_factory.mktemp("table") / "a.csv"
    lines = ("text\n" + "\n".join(fields)).split("\n")
    path.write_text("\n".join(lines), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_tables, "LONGEST_RECORD", longest)
        file = SourceFile(str(path), "a.csv", 0, 0, "", "csv", "utf-8")
        found = list(read_records(file, TextSchema()))
    read_on = 2
    for record in found:
        assert record.line >= read_on
        assert all(not line.strip("\r") for line in lines[read_on - 1 : record.line - 1])
        read_on = record.line + 1 + (record.text or "").count("\n")
    assert all(not line.strip("\r") for line in lines[read_on - 1 :])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_quotes_in_tsv_are_text(tmp_path: Path, encoding: str, end: str) -> None:
    texts = ['"风寒"是一种外邪', '"未闭合的引号', '他说："头痛"', '"整句加引号"', "a\rb\u2028c", "最后一行"]
    path = tmp_path / "a.tsv"
    rows = ["text\tid", *(f"{text}\t{number}" for number, text in enumerate(texts)), "", "只有一列"]
    path.write_bytes(end.join(rows).encode(encoding))
    found = records(path)
    assert [text for _, text, _ in found] == [*texts, None]
    assert found[-1][::2] == (9, "1 columns where the header has 2")


def test_overlong_json_line_is_refused_and_the_next_one_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_json, "LONGEST_RECORD", 200)
    monkeypatch.setattr(read_text, "SAMPLE_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("first", "x" * 1000, "last")))
    assert [(line, text) for line, text, _ in records(path)] == [(1, "first"), (2, None), (3, "last")]


def test_question_and_answer_records_need_named_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ask": "头痛怎么办", "hint": null, "answer": "多休息"}\n')
    with pytest.raises(InputError, match=r'a\.jsonl:1: none of text.*this record has "ask", "hint", "answer"'):
        read(path)
    assert read(path, fields=["ask", "hint", "answer"]) == ["头痛怎么办\n多休息"]
    with pytest.raises(InputError, match='"question" is missing'):
        read(path, fields=["question"])


JSON_VALUES = st.recursive(
    st.text(max_size=20) | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(JSON_VALUES, max_size=6), indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9))
def test_json_list_is_read_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("list") / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    expected = [value for value in values if isinstance(value, str) or (isinstance(value, dict) and "text" in value)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_json, "SAMPLE_BYTES", chunk)
        with encodings.Stream(str(path), "", "utf-8") as stream:
            found = list(read_json.json_list(stream, str(path), TextSchema()))
    assert len(found) == len(values)
    assert [record.text for record in found if record.text is not None] == [
        value if isinstance(value, str) else value["text"] or ""
        for value in expected
        if isinstance(value, str) or value["text"] is None or isinstance(value["text"], str)
    ]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('["a", "b"', "the list has no end"),
        ('["a" "b"]', "where a comma belongs"),
        ('["a", ]', "Expecting value"),
        ('["a"]\n["b"]', "something follows"),
        ('["a", {"text": }]', "Expecting value"),
        ('["a", "b\n"]', "Invalid control character"),
    ],
)
def test_broken_json_list_is_fatal_because_nothing_after_it_can_be_told_apart(
    tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=f"a.json:\\d: broken JSON list: .*{problem}"):
        read(tmp_path / "a.json")


def test_single_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"安全": ["a"]}, indent=1))
    with pytest.raises(InputError, match="one JSON object over several lines"):
        read(tmp_path / "a.json")


def test_directories_and_globs_are_read_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/10.txt", "a/1.txt", "a/.hidden.txt", ".git/3.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    assert read(tmp_path) == ["a/1.txt\n", "a/10.txt\n", "b/2.txt\n"]
    assert list_files([str(tmp_path)]).ignored == 1
    assert read(tmp_path / "*" / "1*.txt") == ["a/1.txt\n", "a/10.txt\n"]


def test_what_is_not_there_or_not_readable_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for paths, problem in (
        ([], "There is no data"),
        (["missing"], "no such file"),
        (["a.docx"], "not a known kind"),
        (["empty"], "no readable file"),
        (["a.txt", "a.*t"], "listed twice"),
    ):
        with pytest.raises(InputError, match=problem):
            list_files([str(tmp_path / path) for path in paths])


def test_not_parquet_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read(tmp_path / "a.parquet")


def test_real_files_give_the_known_numbers_of_documents(real_data: Path) -> None:
    counts = {
        "pretrain/drug.json": ([], 2441),
        "pretrain/tcm_classics.jsonl": ([], 59),
        "pretrain/gb18030": ([], 3),
        "pretrain/fever.txt": ([], 1),
        "sft/alpaca_medical_8k.jsonl": (["instruction", "input", "output"], 8658),
        "sft/toyhom_gbk.csv": (["title", "ask", "answer"], 7644),
        "sft/context_target_7k.jsonl": (["context", "target"], 7622),
    }
    for name, (fields, count) in counts.items():
        options = ReadOptions(fields=fields, min_characters=1, on_error="fail")
        assert sum(1 for _ in read_texts([real_data / name], options)) == count, name


def test_real_text_is_read_exactly(real_data: Path) -> None:
    for number in range(3):
        path = real_data / "pretrain" / "gb18030" / f"00{number}.txt"
        assert read(path) == [path.read_bytes().decode("gb18030")]
    path = real_data / "pretrain" / "tcm_classics.jsonl"
    assert read(path) == [json.loads(line)["text"] for line in path.read_bytes().splitlines()]


def test_a_number_that_python_does_not_read_is_broken_json(tmp_path: Path) -> None:
    long = '{"text": "甲", "id": %s}' % ("1" * 5000)
    (tmp_path / "a.jsonl").write_text(f'{long}\n{{"text": "乙"}}\n')
    (tmp_path / "b.json").write_text(f"[{long}]")
    lines = probe(list_files([tmp_path / "a.jsonl"]).files[0], ReadOptions())
    first, second = read_records(lines, TextSchema())
    assert first.reason == "broken JSON: a number of thousands of digits" and second.text == "乙"
    with pytest.raises(InputError, match=r"b\.json:1: broken JSON list: a number of thousands of digits"):
        list(read_texts([tmp_path / "b.json"]))
