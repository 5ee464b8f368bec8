from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.data.check import Report, check, render
from engine.data.prepare import Progress, prepare
from engine.data.progress import ProgressLine
from engine.data.shards import token_path
from engine.data.sources import ReadOptions
from model.errors import InputError
from model.tokenizer import Tokenizer

TEXTS = [
    "高血压患者应低盐饮食并按时服药。",
    "感冒多饮水，注意休息，必要时就医。",
    "高血压患者应低盐饮食并按时服药。",
    "短",
]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    lines.insert(1, '{"text": ')
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.txt").write_bytes("糖尿病患者应控制饮食，监测血糖。\n".encode("gbk"))
    (folder / "readme.md").write_text("x")
    return folder


def facts(report: Report) -> list[object]:
    names = ("files", "ignored_files", "encodings", "formats", "documents", "characters", "duplicates", "short")
    return [getattr(report, name) for name in (*names, "faults", "places", "divided")]


def test_report_counts_what_is_there(raw: Path) -> None:
    report = check([str(raw)])
    assert (report.files, report.ignored_files, report.documents, report.duplicates) == (2, 1, 4, 1)
    assert (report.short, report.faults.total(), report.divided) == (1, 1, 0)
    assert report.encodings == {"utf-8": 1, "gbk": 1} and report.formats == {"json_lines": 1, "text": 1}
    assert report.characters == sum(map(len, TEXTS[:3])) + 17
    assert report.lengths.tolist() == [*map(len, TEXTS[:3]), 17] and report.tokens is None
    kind, place = "broken JSON: Expecting value at character N", f"{raw}/a.jsonl:2"
    assert report.places == {kind: [f"{place}: broken JSON: Expecting value at character 9"]}
    assert report.sample == TEXTS[0]


def test_prepared_and_raw_text_give_the_same_report(raw: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", workers=1)
    from_raw, from_shards = check([str(raw)], tokenizer), check([str(directory)], verify=True)
    assert facts(from_raw) == facts(from_shards)
    assert from_raw.tokens == from_shards.tokens == sum(from_raw.lengths)
    assert from_raw.lengths.tolist() == from_shards.lengths.tolist()
    assert from_raw.sample == from_shards.sample == TEXTS[0]


def test_parts_are_reported_as_the_whole(raw: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for index in (1, 2):
        prepare([raw], tokenizer, tmp_path / "out", part=(index, 2), unit_bytes=100, workers=1)
    assert facts(check([str(tmp_path / "out")])) == facts(check([str(raw)]))


def test_any_name_of_a_file_is_reported(raw: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Unicode has line ends that JSON does not spell out."""
    (raw / "a.jsonl").rename(raw / "a\u2028b\x85c.jsonl")
    directory = prepare([raw], tokenizer, tmp_path / "out", workers=1)
    assert facts(check([str(directory)])) == facts(check([str(raw)]))


def test_overlap_with_held_out_text_is_counted(raw: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps([TEXTS[1], "别的病人也应按时服药并复诊。"]))
    prepared = prepare([held_out], tokenizer, tmp_path / "prepared", workers=1)
    for other in (held_out, prepared):
        report = check([str(raw)], held_out=[str(other)])
        assert (report.held_out, report.overlap) == (2, 1)
    assert "2 documents, 1 of them also to be trained on" in render(report)


def test_damaged_byte_is_found_on_request(raw: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", workers=1)
    shard = token_path(directory, 0)
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    assert check([str(directory)]).documents == 4
    with pytest.raises(InputError, match="is not what was written"):
        check([str(directory)], verify=True)


def test_raw_and_prepared_are_not_mixed(raw: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = prepare([raw], tokenizer, tmp_path / "out", workers=1)
    with pytest.raises(InputError, match="prepared, beside raw files"):
        check([str(raw), str(directory)])


def test_malformed_record_is_fatal_on_request(raw: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl:2: broken JSON"):
        check([str(raw)], options=ReadOptions(on_error="fail"))


def test_page_shows_a_bar_for_each_doubling(raw: Path) -> None:
    page = render(check([str(raw)]))
    assert "encodings   1 utf-8, 1 gbk" in page
    assert "documents   4" in page
    bars = [line for line in page.splitlines() if "█" in line]
    assert [line.split()[:4] for line in bars] == [["16", "–", "31", "4"]]


def test_page_of_nothing_is_printed_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    assert "documents   0" in render(check([str(tmp_path / "a.txt")]))


def test_progress_says_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine("Preparing")
    line(Progress(done=60_000_000, total=100_000_000, resumed=20_000_000, documents=5, tokens=7, seconds=4.0))
    line(Progress(done=61_000_000, total=100_000_000, resumed=20_000_000, documents=5, tokens=7, seconds=4.1))
    line(Progress(done=100_000_000, total=100_000_000, resumed=20_000_000, documents=9, tokens=9, seconds=8.0))
    first, last = capsys.readouterr().err.splitlines()
    assert first == "Preparing  60%  60 of 100 MB  5 documents  7 tokens  10.0 MB/s  0:04 left"
    assert last.startswith("Preparing 100%")
