"""Documents of one file, one at a time, in memory that does not grow with the file.

Every reader yields `Record`s in the file's order: a text exactly as it stands there, or a reason why there is
none. Text, JSON lines and TSV/CSV are read as bytes up to a newline and then decoded, so one bad line costs one record.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from engine.data.encodings import SAMPLE_BYTES, Stream
from model.errors import InputError

Format = Literal["text", "json_lines", "json_list", "csv", "tsv", "parquet"]
Document = Literal["file", "paragraph", "line"]

# Where a record's text is looked for, in this order.
TEXT_FIELDS = ("text", "content", "contents", "document", "article", "body", "正文", "内容", "文本")
LONGEST_RECORD = 64 << 20  # bytes of one JSON value or one table field
_PROBED_RECORDS = 100


class Record(NamedTuple):
    """One document, or one that could not be read.

    line: where it begins, from 1 within what was read (the row, for Parquet).
    text: None for a record that was refused; `reason` then says why.
    is_first, is_last: a document longer than `longest` characters comes as several records.
    """

    line: int
    text: str | None
    reason: str = ""
    is_first: bool = True
    is_last: bool = True


@dataclass(frozen=True)
class SourceFile:
    """A file and how it is to be read.

    source: index of the PATH argument that it came from.
    name: path below that argument, the same on every machine.
    compression: "", "gz" or "zst".
    format, encoding, document: found by `sources.probe`, "" before that. `document` is for text alone.
    """

    path: str
    name: str
    source: int
    size: int
    compression: str
    format: Format
    encoding: str = ""
    document: Document | Literal[""] = ""

    @property
    def is_seekable(self) -> bool:
        """Whether reading can begin in the middle: at a line, a blank line, or a row group."""
        if self.format == "parquet":
            return True
        is_plain = not self.compression and self.encoding != "utf-16"
        by_line = self.format == "json_lines" or (self.format == "text" and self.document != "file")
        return is_plain and by_line


def read_records(
    file: SourceFile, fields: Sequence[str], longest: int, start: int = 0, end: int | None = None
) -> Iterator[Record]:
    """Documents of a file, or of a part of it.

    Args:
        fields: record fields joined to one text by newlines; empty: the first of TEXT_FIELDS.
        longest: characters; a longer document is divided at ends of lines where it can be.
        start, end: bytes of a seekable file, at ends of records (row groups, for Parquet).
    Raises:
        InputError: the file is damaged as a whole, so that its records cannot be told apart.
    """
    if file.format == "parquet":
        yield from _divide(_parquet(file, fields, start, end), longest)
        return
    with Stream(file.path, file.compression, file.encoding) as stream:
        yield from read_stream(stream, file, fields, longest, start, end)


def read_stream(
    stream: Stream, file: SourceFile, fields: Sequence[str], longest: int, start: int = 0, end: int | None = None
) -> Iterator[Record]:
    """`read_records` on an open stream, for a caller that wants to watch how far it got."""
    if start:
        stream.seek(start)
    if file.format == "text":
        assert file.document, "a text file is probed before it is read"
        yield from _text(_lines(stream, start, end), stream.codec, file.document, longest)
    elif file.format == "json_lines":
        yield from _divide(_json_lines(stream, start, end, fields), longest)
    elif file.format == "json_list":
        yield from _divide(_json_list(stream, file.path, fields), longest)
    else:
        yield from _divide(_table(stream, file, fields), longest)


def check_first_records(file: SourceFile, fields: Sequence[str]) -> None:
    """Refuse a file none of whose first records has a text.

    Raises:
        InputError: names the first record's line and what it holds.
    """
    if file.format == "text":
        return
    records = list(itertools.islice(read_records(file, fields, LONGEST_RECORD), _PROBED_RECORDS))
    if records and all(record.text is None for record in records):
        first = records[0]
        raise InputError(
            f"{file.path}:{first.line}: {first.reason}. Name the fields to be joined with --data.fields, "
            "or leave the file out."
        )


# Lines and text


def _lines(stream: Stream, start: int, end: int | None) -> Iterator[bytes]:
    """Lines with their ends; one that is longer than a sample comes in several pieces."""
    position = start
    while (end is None or position < end) and (line := stream.readline(SAMPLE_BYTES)):
        position += len(line)
        yield line


def _text(lines: Iterable[bytes], codec: str, document: Document, longest: int) -> Iterator[Record]:
    """Plain text. A line's end (\\n or \\r\\n) belongs to it, except after the last line of a paragraph."""
    builder = _Builder(codec, longest)
    number = 0
    is_new_line = True
    for line in lines:
        number += is_new_line
        is_whole_line = is_new_line and line.endswith(b"\n")
        is_new_line = line.endswith(b"\n")
        if document == "file":
            yield from builder.add(line, number)
        elif is_whole_line and not line.strip(b" \t\r\n"):
            yield from builder.finish(without_line_end=True)
        else:
            yield from builder.add(line, number)
            if document == "line" and is_new_line:
                yield from builder.finish(without_line_end=True)
    yield from builder.finish(without_line_end=document != "file")


class _Builder:
    """Gathers one document from pieces of bytes and hands out what exceeds the longest length."""

    def __init__(self, codec: str, longest: int) -> None:
        self._decoder = codecs.getincrementaldecoder(codec)()
        self._codec = codec
        self._longest = longest
        self._clear()

    def _clear(self) -> None:
        self._decoder.reset()
        self._pieces: list[str] = []
        self._characters = 0
        self._line = 0
        self._is_first = True
        self._reason = ""

    def add(self, piece: bytes, line: int) -> Iterator[Record]:
        self._line = self._line or line
        if self._reason:
            return
        try:
            text = self._decoder.decode(piece)
        except UnicodeDecodeError as error:
            self._reason = f"line {line} holds bytes that are not {self._codec} ({error.object[error.start]:#04x})"
            self._pieces = []
            return
        self._pieces.append(text)
        self._characters += len(text)
        if self._characters > self._longest:
            whole = "".join(self._pieces)
            cuts = [*_cuts(whole, self._longest)]
            for begin, stop in cuts[:-1]:
                yield Record(self._line, whole[begin:stop], is_first=self._is_first, is_last=False)
                self._is_first = False
            self._pieces = [whole[cuts[-1][0] :]]
            self._characters = len(self._pieces[0])

    def finish(self, without_line_end: bool) -> Iterator[Record]:
        if self._line:
            if not self._reason and self._decoder.getstate()[0]:
                self._reason = f"its last character is cut short ({self._codec})"
            if self._reason:
                yield Record(self._line, None, self._reason)
            else:
                text = "".join(self._pieces)
                if without_line_end and text.endswith("\n"):
                    text = text[: -2 if text.endswith("\r\n") else -1]
                yield Record(self._line, text, is_first=self._is_first)
        self._clear()


def _cuts(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Bounds of pieces of at most `longest` characters, cut after a newline if the second half has one."""
    start = 0
    while len(text) - start > longest:
        stop = text.rfind("\n", start + longest // 2, start + longest) + 1 or start + longest
        yield start, stop
        start = stop
    yield start, len(text)


def _divide(records: Iterable[Record], longest: int) -> Iterator[Record]:
    for record in records:
        if record.text is None or len(record.text) <= longest:
            yield record
            continue
        for start, stop in _cuts(record.text, longest):
            yield Record(record.line, record.text[start:stop], "", start == 0, stop == len(record.text))


# JSON


class _RecordError(Exception):
    """Why a record gives no text; becomes its reason."""


def record_text(record: Any, fields: Sequence[str]) -> str:
    """The text of a parsed record: itself, its text field, or the named fields joined by newlines."""
    if isinstance(record, str) and not fields:
        return record
    if not isinstance(record, dict):
        raise _RecordError(f"a record is an object{'' if fields else ' or a text'}, this one is {_kind(record)}")
    if not fields:
        found = next((name for name in TEXT_FIELDS if name in record), None)
        if found is None:
            raise _RecordError(f"none of {', '.join(TEXT_FIELDS[:3])}, ... is here; this record has {_names(record)}")
        fields = (found,)
    values = []
    for name in fields:
        if name not in record:
            raise _RecordError(f'"{name}" is missing; this record has {_names(record)}')
        value = record[name]
        if value is not None and not isinstance(value, str):
            raise _RecordError(f'"{name}" is {_kind(value)}, not a text')
        values.append(value or "")
    return "\n".join(filter(None, values))


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _names(record: Iterable[str]) -> str:
    names = [f'"{name}"' for name in record]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def _record(line: int, value: Any, fields: Sequence[str]) -> Record:
    try:
        return Record(line, record_text(value, fields))
    except _RecordError as error:
        return Record(line, None, str(error))


def _json_lines(stream: Stream, start: int, end: int | None, fields: Sequence[str]) -> Iterator[Record]:
    pieces: list[bytes] = []
    size = 0
    number = 1
    for piece in itertools.chain(_lines(stream, start, end), [b""]):
        size += len(piece)
        if size <= LONGEST_RECORD:
            pieces.append(piece)
        if piece and not piece.endswith(b"\n"):
            continue
        if size > LONGEST_RECORD:
            yield Record(number, None, f"a line of {size >> 20} MiB; records end at {LONGEST_RECORD >> 20} MiB")
        elif line := b"".join(pieces).strip(b" \t\r\n"):
            yield _json_line(number, line, stream.codec, fields)
        pieces.clear()
        size = 0
        number += 1


def _json_line(number: int, line: bytes, codec: str, fields: Sequence[str]) -> Record:
    try:
        return _record(number, json.loads(line.decode(codec)), fields)
    except UnicodeDecodeError as error:
        return Record(number, None, f"byte {error.start} of the line is not {codec} ({line[error.start]:#04x})")
    except RecursionError:
        return Record(number, None, "broken JSON: nested too deeply")
    except json.JSONDecodeError as error:
        return Record(number, None, f"broken JSON: {error.msg} at character {error.pos + 1}")


_SPACES = re.compile(r"[ \t\r\n]*")


class _JsonText:
    """A window on a JSON text that moves forward; values are taken from its front."""

    def __init__(self, stream: Stream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._decoder = codecs.getincrementaldecoder(stream.codec)()
        self._scan = json.JSONDecoder().raw_decode
        self._window = ""
        self._position = 0
        self._bytes = 0
        self._is_end = False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            self._advance(_SPACES.match(self._window, self._position).end())  # type: ignore[union-attr]
            if self._position < len(self._window):
                return self._window[self._position]
            if self._is_end:
                return ""
            self._fill(SAMPLE_BYTES)

    def skip(self) -> None:
        """Pass the character that `peek` showed."""
        self._advance(self._position + 1)

    def value(self) -> Any:
        """The JSON value that begins here, with what follows it in the window."""
        while True:
            try:
                value, stop = self._scan(self._window, self._position)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except json.JSONDecodeError as error:
                if self._is_end:
                    raise self.error(error.msg) from None
            else:
                # A number may go on behind the window's end; everything else shows its own end.
                if stop < len(self._window) or self._is_end:
                    self._advance(stop)
                    return value
            waiting = len(self._window) - self._position
            if waiting > LONGEST_RECORD:
                raise self.error(f"no value ends within {LONGEST_RECORD >> 20} Mi characters")
            self._fill(max(SAMPLE_BYTES, waiting))  # doubling keeps a long value's cost linear

    def error(self, problem: str) -> InputError:
        return InputError(f"{self._path}:{self.line}: broken JSON list: {problem}. Mend or remove the file.")

    def _advance(self, position: int) -> None:
        self.line += self._window.count("\n", self._position, position)
        self._position = position

    def _fill(self, size: int) -> None:
        chunk = self._stream.read(size)
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = self._bytes - pending + error.start
            raise InputError(
                f"{self._path}: byte {offset} is not {self._stream.codec}. Mend or remove the file."
            ) from None
        self._bytes += len(chunk)
        self._is_end = not chunk
        self._window = self._window[self._position :] + text
        self._position = 0


def _json_list(stream: Stream, path: str, fields: Sequence[str]) -> Iterator[Record]:
    text = _JsonText(stream, path)
    if text.peek() != "[":
        raise text.error("it does not begin with [")
    text.skip()
    if text.peek() == "]":
        text.skip()
    else:
        while True:
            text.peek()
            line = text.line
            yield _record(line, text.value(), fields)
            separator = text.peek()
            text.skip()
            if separator == "]":
                break
            if separator != ",":
                raise text.error("the list has no end" if not separator else f"{separator!r} where a comma belongs")
    if text.peek():
        raise text.error("something follows the list's end")


# Tables

_csv_limit = threading.Lock()


def _table(stream: Stream, file: SourceFile, fields: Sequence[str]) -> Iterator[Record]:
    """CSV or TSV with a header. Undecodable bytes become surrogates, which later refuse their record alone."""
    with _csv_limit:
        csv.field_size_limit(LONGEST_RECORD)
    lines = (line.decode(stream.codec, "surrogateescape") for line in iter(stream.readline, b""))
    rows = csv.reader(lines, delimiter="\t" if file.format == "tsv" else ",", strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(line, None, f"broken table row: {error}")
            continue
        if not row:
            continue
        if header is None:
            header = row
        elif len(row) != len(header):
            yield Record(line, None, f"{len(row)} columns where the header has {len(header)}")
        else:
            yield _record(line, dict(zip(header, row, strict=True)), fields)


# Parquet


def open_parquet(path: str) -> Any:
    """The file's pyarrow reader.

    Raises:
        InputError: no pyarrow, or not Parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow. pip install 'chimed-engine[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}). Fetch the file again.") from None


def _parquet(file: SourceFile, fields: Sequence[str], start: int, end: int | None) -> Iterator[Record]:
    import pyarrow

    with open_parquet(file.path) as table:
        columns = table.schema_arrow.names
        wanted = [name for name in fields or TEXT_FIELDS if name in columns]
        groups = range(start, table.num_row_groups if end is None else end)
        row = sum(table.metadata.row_group(group).num_rows for group in range(start))
        try:
            for batch in table.iter_batches(
                256, row_groups=[*groups], columns=(wanted if fields else wanted[:1]) or columns
            ):
                for value in batch.to_pylist():
                    row += 1
                    yield _record(row, value, fields)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{file.path}: damaged after row {row} ({error}). Fetch the file again.") from None
