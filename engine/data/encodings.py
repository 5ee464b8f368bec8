"""Bytes to exact text: compression undone, the encoding detected, binary files refused.

Detection looks at a sample; every byte read later is decoded strictly, so a wrong guess can stop a run or cost
records but never gives wrong text. GBK and GB2312 are parts of GB18030 and are decoded by its codec.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from model.errors import InputError

Encoding = Literal["auto", "utf-8", "utf-16", "gbk", "gb18030", "big5"]

SAMPLE_BYTES = 1 << 20
# Multi-byte characters that settle a file's encoding; a file with fewer is read on, as far as this many samples.
ENOUGH_CHARACTERS = 64
MOST_SAMPLES = 16
_PACKED_BYTES = 1 << 16

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, ""),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a zip archive (perhaps .docx or .xlsx)",
    b"\xd0\xcf\x11\xe0": "an old Word or Excel document",
    b"\x1f\x8b": "gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "zstandard; let its name end in .zst",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf": "a 7-zip archive",
    b"Rar!": "a RAR archive",
    b"PAR1": "Parquet; let its name end in .parquet",
    b"SQLite format 3": "an SQLite database",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
}
_DECOMPRESSION_ERRORS: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)


def open_raw(path: str | Path) -> BinaryIO:
    """A user's file, for reading.

    Raises:
        InputError: it cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Check its name and its permissions.") from None


def codec_of(encoding: str) -> str:
    """Python's codec for an encoding that `detect_encoding` reports."""
    return "gb18030" if encoding == "gbk" else encoding


class Stream:
    """A file's bytes, decompressed, in an encoding where a newline is the byte 0x0A and nothing else.

    UTF-16 is passed on as UTF-8 (`codec` says what the bytes are), and a byte-order mark is left out.

    Attributes:
        codec: Python codec of what `readline` and `read` return; "" where no encoding was given.
        begin: where the text begins in an uncompressed file: behind the mark.
    """

    def __init__(self, path: str, compression: str, encoding: str) -> None:
        self.begin = 0
        self._raw = open_raw(path)
        self._path = path
        stream = _decompress(self._raw, path, compression)
        self.codec = codec_of(encoding)
        if encoding == "utf-16":
            stream, self.codec = io.BufferedReader(_Recoder(stream, path)), "utf-8"
        elif encoding == "utf-8-sig":
            self.begin = len(stream.read(len(codecs.BOM_UTF8)))
            self.codec = "utf-8"
        self._stream = stream

    def readline(self, limit: int = -1) -> bytes:
        return self._guarded(self._stream.readline, limit)

    def read(self, size: int = -1) -> bytes:
        return self._guarded(self._stream.read, size)

    def seek(self, offset: int) -> None:
        """Go to a byte of an uncompressed file."""
        self._stream.seek(offset)

    def consumed(self) -> int:
        """Bytes taken from the file on disk so far, for progress."""
        return self._raw.tell()

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guarded(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except (*_DECOMPRESSION_ERRORS, *_zstd_errors()) as error:
            raise InputError(f"{self._path}: damaged or cut short ({error}). Fetch or compress it again.") from None


class _Recoder(io.RawIOBase):
    """UTF-16 with its mark in, UTF-8 out."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        self._stream = stream
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-16")()
        self._ready = b""
        self._taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._stream.read(SAMPLE_BYTES)
            pending = len(self._decoder.getstate()[0])
            try:
                self._ready = self._decoder.decode(chunk, final=not chunk).encode()
            except UnicodeError as error:
                offset = self._taken - pending + getattr(error, "start", 0)
                raise InputError(f"{self._path}: byte {offset} is not UTF-16. Mend or remove the file.") from None
            self._taken += len(chunk)
            if not chunk:
                break
        return _hand_out(self, buffer)


def _decompress(raw: BinaryIO, path: str, compression: str) -> BinaryIO:
    if compression == "gz":
        return cast(BinaryIO, gzip.open(raw))
    if compression == "zst":
        return io.BufferedReader(_Zstandard(raw, path))
    return raw


class _Zstandard(io.RawIOBase):
    """Frames end to end, decompressed. The library's own stream takes a cut file for a shorter one; this does not."""

    def __init__(self, stream: BinaryIO, path: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise InputError(f"{path}: reading .zst needs zstandard. pip install 'chimed-engine[data]'") from None
        self._stream = stream
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._stream.read(_PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or self._new_frame()
            self._ready = self._frame.decompress(self._packed)
            self._packed = b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        return _hand_out(self, buffer)


def _hand_out(source: Any, buffer: Any) -> int:
    """Move what is ready into a caller's buffer."""
    size = min(len(buffer), len(source._ready))
    buffer[:size] = source._ready[:size]
    source._ready = source._ready[size:]
    return size


def _zstd_errors() -> tuple[type[Exception], ...]:
    try:
        import zstandard
    except ImportError:
        return ()
    return (zstandard.ZstdError,)


def detect_encoding(path: str, compression: str, wanted: Encoding = "auto") -> str:
    """The encoding of a text file: utf-8, utf-8-sig, utf-16, gbk, gb18030, or the one that was asked for.

    A file is UTF-8 if its bytes are. Few GB18030 texts are also valid UTF-8 (a word or two, all of whose characters
    then look Latin, Greek, Cyrillic or Arabic): where common Chinese characters stand side by side in the GB18030
    reading, that one is taken. "gbk" means that the sample needs no more than GBK.

    Raises:
        InputError: binary, neither encoding, or not the one asked for; the message names the byte.
    """
    with Stream(path, compression, encoding="") as stream:
        head = stream.read(SAMPLE_BYTES)
        marked = _refuse_binary(head, path)
        if wanted not in ("auto", "utf-8"):
            return wanted
        if marked or wanted == "utf-8":
            return marked or "utf-8"
        offset, line = 0, 1
        while head.isascii() and len(head) == SAMPLE_BYTES:
            offset += len(head)
            line += head.count(b"\n")
            head = stream.read(SAMPLE_BYTES)
            _refuse_binary(head, path)
        samples = 1
        is_end = len(head) < SAMPLE_BYTES
        while not is_end and samples < MOST_SAMPLES and _multibyte_count(head) < ENOUGH_CHARACTERS:
            more = stream.read(SAMPLE_BYTES)
            is_end = len(more) < SAMPLE_BYTES
            head += more
            samples += 1
    return _choose(head, is_end, offset, path, line)


def _multibyte_count(sample: bytes) -> int:
    """A lower bound of the characters in `sample` that are not ASCII: none has more than four bytes."""
    return (len(sample) - len(sample.translate(None, _HIGH_BYTES))) // 4


_HIGH_BYTES = bytes(range(128, 256))


def _refuse_binary(sample: bytes, path: str) -> str:
    """The encoding that a byte-order mark names, or "".

    Raises:
        InputError: the file holds something else than text.
    """
    for magic, kind in _BINARY.items():
        if sample.startswith(magic):
            raise InputError(f"{path}: this is {kind}, not text. Convert it, or leave it out.")
    for mark, encoding in _MARKS:
        if sample.startswith(mark):
            if not encoding:
                raise InputError(f"{path}: UTF-32 is not read. Convert the file to UTF-8.")
            if encoding != "utf-16":
                break
            return encoding
    else:
        encoding = ""
    if b"\0" in sample:
        raise InputError(
            f"{path}: byte {sample.index(0)} is NUL, so this is a binary file (or UTF-16 without its mark). "
            "Convert it to UTF-8, or leave it out."
        )
    return encoding


def _first_error(sample: bytes, codec: str, is_end: bool) -> int | None:
    """Index of the first byte that `codec` cannot read; a character cut off by the sample's end is no error."""
    try:
        codecs.getincrementaldecoder(codec)().decode(sample, final=is_end)
    except UnicodeDecodeError as error:
        return error.start
    return None


def _choose(sample: bytes, is_end: bool, offset: int, path: str, line: int = 1) -> str:
    """The encoding of a sample. offset, line: of its first byte in the file."""
    utf8_error = _first_error(sample, "utf-8", is_end)
    gb_error = _first_error(sample, "gb18030", is_end)
    if utf8_error is None:
        is_chinese = gb_error is None and _reads_as_chinese(sample)
        return "gbk" if is_chinese else "utf-8"
    if gb_error is None and _is_plausible(sample):
        return "gbk" if _first_error(sample, "gbk", is_end) is None else "gb18030"
    for codec, error in (("utf-8", utf8_error), ("gb18030", gb_error)):
        if error is not None and is_end and _is_cut_off(sample, codec, error):
            raise InputError(
                f"{path}: the file is cut off within its last character (byte {offset + error}, {codec.upper()}). "
                f"Fetch it again, or read what is there with --data.encoding {codec}."
            )
    what = "read as GB18030 the text is not Chinese" if gb_error is None else f"byte {offset + gb_error} is not GB18030"
    remedy = "Mend the file, or name its encoding with --data.encoding."
    if _is_mostly_utf8(sample, is_end):
        remedy = "Mend that line, or leave out whatever is not UTF-8 with --data.encoding utf-8."
    line += sample.count(b"\n", 0, utf8_error)
    raise InputError(f"{path}:{line}: byte {offset + utf8_error} of the file is not UTF-8, and {what}. {remedy}")


def _is_cut_off(sample: bytes, codec: str, error: int) -> bool:
    """Whether a file reads well, and not as ASCII alone, up to an unfinished character at its end."""
    reads_well = _first_error(sample, codec, is_end=False) is None and not sample[:error].isascii()
    return reads_well and (codec == "utf-8" or _is_plausible(sample))


def _is_mostly_utf8(sample: bytes, is_end: bool) -> bool:
    """Whether most of the lines that are not ASCII are UTF-8."""
    lines = sample.split(b"\n")
    wide = [line for line in (lines if is_end else lines[:-1]) if not line.isascii()]
    return 2 * sum(_first_error(line, "utf-8", is_end=True) is not None for line in wide) < len(wide)


def _is_common(pair: bytes) -> bool:
    """Two bytes of GB2312 punctuation (rows 1 to 3) or of its 3755 most used characters (rows 16 to 55)."""
    return len(pair) == 2 and pair[1] >= 0xA1 and (0xA1 <= pair[0] <= 0xA3 or 0xB0 <= pair[0] <= 0xD7)


def _gb_characters(sample: bytes) -> list[bytes]:
    """The first characters of a sample, as GB18030 bytes."""
    text = codecs.getincrementaldecoder("gb18030")().decode(sample)
    start = next((index for index, character in enumerate(text) if not character.isascii()), 0)
    return [character.encode("gb18030") for character in text[start : start + 4096]]


def _is_plausible(sample: bytes) -> bool:
    """Chinese text is mostly common characters; other 8-bit encodings read as GB18030 are mostly rare ones."""
    characters = [character for character in _gb_characters(sample) if len(character) > 1]
    return sum(map(_is_common, characters)) >= 0.4 * len(characters)


def _reads_as_chinese(sample: bytes) -> bool:
    """Whether valid UTF-8 is nevertheless GB18030: no character that needs three bytes of UTF-8, and in the
    GB18030 reading only common characters, most of them beside another one."""
    if any(byte >= 0xE0 for byte in sample) or sample.isascii():
        return False
    characters = [b" ", *_gb_characters(sample), b" "]
    wide = [index for index, character in enumerate(characters) if len(character) > 1]
    if not all(_is_common(characters[index]) for index in wide):
        return False
    neighbours = sum(len(characters[index - 1]) > 1 or len(characters[index + 1]) > 1 for index in wide)
    return 2 * neighbours > len(wide)


def count_newlines(path: str | Path, end: int, start: int = 0) -> int:
    """Newlines in bytes [start, end) of an uncompressed file."""
    count = 0
    with open_raw(path) as file:
        file.seek(start)
        while start < end and (chunk := file.read(min(SAMPLE_BYTES, end - start))):
            count += chunk.count(b"\n")
            start += len(chunk)
    return count
