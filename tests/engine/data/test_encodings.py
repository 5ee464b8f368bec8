from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import encodings
from engine.data.encodings import Stream, codec_of, count_newlines, detect_encoding
from engine.data.reading import read_records
from engine.data.sources import ReadOptions, list_files, probe
from model.errors import InputError

TEXT = "高血压是以体循环动脉压升高为主要特征的慢性疾病。\n患者应低盐饮食，按时服药。\n"

# The 3755 characters of level 1, in GB2312 rows 16 to 55.
COMMON = [bytes([row, cell]).decode("gb18030") for row in range(0xB0, 0xD7) for cell in range(0xA1, 0xFF)]


def detect(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return detect_encoding(str(path), "")


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (TEXT.encode(), "utf-8"),
        (TEXT.encode("utf-8-sig"), "utf-8-sig"),
        (TEXT.encode("utf-16"), "utf-16"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "utf-16"),
        (TEXT.encode("gbk"), "gbk"),
        ((TEXT + "㐀𠮷").encode("gb18030"), "gb18030"),
        (b"plain ASCII\n", "utf-8"),
        (b"", "utf-8"),
        ("β-blockers, 5 µg ± 10%".encode(), "utf-8"),
        ("Артериальная гипертензия".encode(), "utf-8"),
        ("Ménière's disease, café".encode(), "utf-8"),
    ],
)
def test_encoding_is_detected_and_text_comes_back_exactly(tmp_path: Path, content: bytes, encoding: str) -> None:
    path = tmp_path / "a.txt"
    assert detect(path, content) == encoding
    with Stream(str(path), "", encoding) as stream:
        text = stream.read().decode(stream.codec)
    expected = content.decode(codec_of(encoding))
    assert text == expected


@given(st.lists(st.sampled_from(COMMON), min_size=2, max_size=40).map("".join))
def test_chinese_in_gb18030_is_never_taken_for_utf8(text: str) -> None:
    content = text.encode("gb18030")
    assert encodings._choose(content, True, 0, "a.txt") == "gbk"


def test_all_pairs_that_are_valid_utf8_are_still_read_as_chinese() -> None:
    ambiguous = [text for text in COMMON if _is_utf8(text.encode("gb18030"))]
    assert len(ambiguous) > 600  # such characters exist in plenty; alone, one of them is a Latin or Greek letter
    for first in ambiguous[::7]:
        for second in ambiguous[::11]:
            assert encodings._choose((first + second).encode("gb18030"), True, 0, "a.txt") == "gbk"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_chinese_after_megabytes_of_ascii_is_still_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "SAMPLE_BYTES", 1 << 14)
    ascii_text = b"0123456789abcde\n" * (1 << 16)
    assert len(ascii_text) > 2 * encodings.MOST_SAMPLES * encodings.SAMPLE_BYTES
    assert detect(tmp_path / "a.txt", ascii_text + TEXT.encode("gbk")) == "gbk"
    assert detect(tmp_path / "b.txt", ascii_text + TEXT.encode()) == "utf-8"


@pytest.mark.parametrize("shift", range(4))
def test_character_cut_by_the_end_of_the_sample_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    monkeypatch.setattr(encodings, "SAMPLE_BYTES", 1000)
    monkeypatch.setattr(encodings, "MOST_SAMPLES", 2)
    for encoding in ("utf-8", "gbk"):
        assert detect(tmp_path / "a.txt", b"x" * shift + (TEXT * 100).encode(encoding)) == encoding


def test_neither_encoding_names_line_and_byte(tmp_path: Path) -> None:
    content = TEXT.encode() + b"\xff\xff" + TEXT.encode()
    where = rf"a.txt:3: byte {len(TEXT.encode())} of the file is not UTF-8, and byte \d+ is not GB"
    with pytest.raises(InputError, match=where):
        detect(tmp_path / "a.txt", content)


def test_one_line_of_gbk_is_named_and_costs_itself_alone(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number}{TEXT}β"}, ensure_ascii=False) for number in range(60)]
    content = [line.encode("gb18030" if number == 40 else "utf-8") for number, line in enumerate(lines)]
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError, match=r"a\.jsonl:41: byte \d+ .* with --data\.encoding utf-8\.$"):
        detect(path, b"\n".join(content))
    file = probe(list_files([path]).files[0], ReadOptions(encoding="utf-8"))
    records = list(read_records(file, ReadOptions().schema))
    assert [record.line for record in records if record.text is None] == [41]
    assert [record.text for record in records if record.text] == [
        json.loads(line)["text"] for number, line in enumerate(lines) if number != 40
    ]


def test_lines_are_counted_from_the_beginning_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "SAMPLE_BYTES", 1 << 14)
    ascii_text = b"0123456789abcde\n" * (1 << 12)
    with pytest.raises(InputError, match=rf"a\.txt:{(1 << 12) + 2}: byte"):
        detect(tmp_path / "a.txt", ascii_text + "β\n".encode() + b"\xff\xff" + TEXT.encode())


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", "UTF-8"), ("gb18030", "GB18030")])
def test_file_that_ends_within_a_character_is_called_cut_off(tmp_path: Path, encoding: str, shown: str) -> None:
    content = TEXT.strip().encode(encoding)
    size = len("。".encode(encoding))
    where = rf"cut off within its last character \(byte {len(content) - size}, {shown}\).*--data.encoding {encoding}"
    with pytest.raises(InputError, match=where):
        detect(tmp_path / "a.txt", content[:-1])


@pytest.mark.parametrize(
    "content",
    ["高血壓患者應低鹽飲食，按時服藥並定期檢查。".encode("big5"), "Ménière était très âgé, à côté".encode("latin-1")],
)
def test_other_encodings_are_refused_and_not_misread(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match="is not UTF-8"):
        detect(tmp_path / "a.txt", content)


def test_traditional_characters_in_gbk_are_detected(tmp_path: Path) -> None:
    text = "傷寒論曰：太陽之為病，脈浮，頭項強痛而惡寒。桂枝湯主之。"
    assert detect(tmp_path / "a.txt", text.encode("gbk")) == "gbk"


def test_named_encoding_is_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("高血壓".encode("big5"))
    assert detect_encoding(str(path), "", "big5") == "big5"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"%PDF-1.7\n", "PDF"),
        (b"PK\x03\x04abc", "zip"),
        (gzip.compress(b"text", mtime=0), r"gzip; let its name end in \.gz"),
        (b"abc\0def", "byte 3 is NUL"),
        ("文".encode("utf-16-le"), "."),
    ],
)
def test_binary_files_are_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    with pytest.raises(InputError, match=f"a.txt:.*{kind}"):
        detect(tmp_path / "a.txt", content)


def test_broken_utf16_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff病".encode("utf-16-le") + b"\x00\xd8" + "病".encode("utf-16-le"))
    with Stream(str(path), "", "utf-16") as stream, pytest.raises(InputError, match="byte 4 is not UTF-16"):
        stream.read()


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_said(tmp_path: Path, suffix: str) -> None:
    import zstandard

    content = (TEXT * 1000).encode()
    packed = gzip.compress(content) if suffix == "gz" else zstandard.compress(content)
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="damaged or cut short"):
        detect_encoding(str(path), suffix)


def test_newlines_are_counted_in_a_range(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\nb\nc\n")
    assert count_newlines(path, 4) == 2
    assert count_newlines(path, 6, start=2) == 2


def test_real_files_are_detected(real_data: Path) -> None:
    found = {}
    for path in [*(real_data / "pretrain").rglob("*.*"), *(real_data / "sft").iterdir()]:
        if path.suffix != ".md":
            found[path.name] = detect_encoding(str(path), "")
    assert {name for name, encoding in found.items() if encoding.startswith("gb")} == {
        "000.txt",
        "001.txt",
        "002.txt",
        "toyhom_gbk.csv",
    }
    assert set(found.values()) <= {"utf-8", "gbk", "gb18030"}
