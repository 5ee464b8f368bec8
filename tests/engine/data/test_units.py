from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.reading import read_records
from engine.data.records import TextSchema
from engine.data.sources import ReadOptions, list_files, probe
from engine.data.units import Unit, cut, unit_size
from tests.engine.data.test_reading import WRITERS

LINES = st.lists(st.sampled_from(["", " ", "病", "病 \t ", "高血压患者", "a\r", "x" * 30, "\t"]), max_size=40)


def texts_of(units: list[Unit], files: list, options: ReadOptions) -> list[str | None]:
    found: list[str | None] = []
    for unit in units:
        for segment in unit.segments:
            records = segment.records
            if records is None:
                records = tuple(read_records(files[segment.file], options.schema, segment.start, segment.end))
            found += [record.text for record in records]
    return found


@settings(max_examples=150, deadline=None)
@given(
    lines=LINES,
    size=st.integers(1, 60),
    document=st.sampled_from(["line", "paragraph", "file"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "gbk", "utf-16"]),
)
def test_units_of_any_size_hold_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, document: str, encoding: str
) -> None:
    path = tmp_path_factory.mktemp("units") / "a.txt"
    path.write_bytes("\n".join(lines).encode(encoding))
    options = ReadOptions(document=document)  # type: ignore[arg-type]
    files = [probe(file, options) for file in list_files([path]).files]
    whole = [record.text for record in read_records(files[0], TextSchema(longest=10**6))]
    units = list(cut(files, options, size, lambda unit: True))
    assert texts_of(units, files, options) == whole
    assert whole or not "".join(lines).strip(" \t\r")
    assert sum(unit.size for unit in units) == path.stat().st_size or not whole
    assert [unit.index for unit in units] == list(range(len(units)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json", "a.csv", "a.jsonl.gz"])
def test_large_files_of_every_format_are_cut_and_small_ones_gathered(tmp_path: Path, name: str) -> None:
    content = WRITERS[name.removesuffix(".gz").partition(".")[2]]([f"第{number}份病历" for number in range(400)])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for number in range(5):
        (tmp_path / f"b{number}.txt").write_text("小文件")
    options = ReadOptions()
    files = [probe(file, options) for file in list_files([tmp_path]).files]
    size = 40 if name == "a.parquet" else 500
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.data.units.READ_AHEAD_CHARACTERS", 1000)
        units = list(cut(files, options, size, lambda unit: True))
    assert len(units) > 10
    assert texts_of(units, files, options) == [f"第{number}份病历" for number in range(400)] + ["小文件"] * 5
    assert [segment.file for segment in units[-1].segments] == [1, 2, 3, 4, 5]


def test_unwanted_units_carry_no_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.units.READ_AHEAD_CHARACTERS", 1)
    (tmp_path / "a.json").write_text('["一一一一一一一一一一", "二二二二二二二二二二", "三三三三三三三三三三"]')
    options = ReadOptions()
    files = [probe(file, options) for file in list_files([tmp_path]).files]
    units = list(cut(files, options, 10, lambda unit: unit == 1))
    assert [len(unit.segments[0].records or ()) for unit in units] == [0, 1, 0]


def test_unit_sizes_keep_the_number_of_shards_in_bounds() -> None:
    assert unit_size(1 << 30) == 16 << 20
    assert (1 << 40) / unit_size(1 << 40) <= 4096
