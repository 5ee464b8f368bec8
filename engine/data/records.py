"""What reading a file gives: records, each a text exactly as it stands there or a reason why there is none.

The text of a conversation is JSON (`conversations.py`); everything between a file and its tokens treats both alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

Format = Literal["text", "json_lines", "json_list", "csv", "tsv", "parquet"]
Document = Literal["file", "paragraph", "line"]

# Where a record's text is looked for, in this order.
TEXT_FIELDS = ("text", "content", "contents", "document", "article", "body", "正文", "内容", "文本")
# What only conversations have.
CONVERSATION_FIELDS = {"conversations", "conversation", "messages", "instruction", "history"}
# What a reason says of text that was read in the wrong encoding.
FOREIGN_BYTE = "a byte outside the file's encoding"
LONGEST_RECORD = 64 << 20  # bytes of one JSON value or one table row


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


class RecordError(Exception):
    """Why a record gives no text; becomes its reason."""


class Schema(Protocol):
    """What makes a text of a parsed JSON value or table row.

    longest: characters of a text; what is longer comes in several records.
    advice: to whoever gives a file with no usable record: how to make them so.
    """

    advice: ClassVar[str]

    @property
    def longest(self) -> int: ...

    def text(self, value: Any) -> str:
        """
        Raises:
            RecordError: there is none.
        """
        ...

    def columns(self, names: Sequence[str]) -> list[str]:
        """Those of a table's columns that have to be read."""
        ...

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        """Names of the columns of a CSV or TSV file; `first_row` itself unless it is known to be data."""
        ...


@dataclass(frozen=True)
class TextSchema:
    """A record's text is one of its fields.

    fields: joined to one text by newlines; empty: the first of TEXT_FIELDS.
    """

    fields: tuple[str, ...] = ()
    longest: int = LONGEST_RECORD
    advice: ClassVar[str] = "Name the fields to be joined with --data.fields, or leave the file out."

    def text(self, value: Any) -> str:
        return _record_text(value, self.fields)

    def columns(self, names: Sequence[str]) -> list[str]:
        wanted = [name for name in self.fields or TEXT_FIELDS if name in names]
        return (wanted if self.fields else wanted[:1]) or list(names)

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        return first_row


def _record_text(record: Any, fields: Sequence[str]) -> str:
    """The text of a parsed record: itself, its text field, or the named fields joined by newlines."""
    if isinstance(record, str) and not fields:
        return record
    if not isinstance(record, dict):
        raise RecordError(f"a record is an object{'' if fields else ' or a text'}, this one is {kind_of(record)}")
    if not fields:
        found = next((name for name in TEXT_FIELDS if name in record), None)
        if found is None:
            hint = "; conversations are for tools/sft.py" if CONVERSATION_FIELDS & record.keys() else ""
            raise RecordError(
                f"none of {', '.join(TEXT_FIELDS[:3])}, ... is here; this record has {names_in(record)}{hint}"
            )
        fields = (found,)
    values = []
    for name in fields:
        if name not in record:
            raise RecordError(f'"{name}" is missing; this record has {names_in(record)}')
        value = record[name]
        if value is not None and not isinstance(value, str):
            raise RecordError(f'"{name}" is {kind_of(value)}, not a text')
        values.append(value or "")
    return "\n".join(filter(None, values))


def kind_of(value: Any) -> str:
    """A JSON value in a user's words."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def names_in(record: Iterable[str]) -> str:
    """A record's fields in a user's words."""
    names = [f'"{name}"' for name in record]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"


def to_record(line: int, value: Any, schema: Schema) -> Record:
    """A parsed value as a record."""
    try:
        return Record(line, schema.text(value))
    except RecordError as error:
        return Record(line, None, str(error))


def cuts(text: str, longest: int) -> Iterator[tuple[int, int]]:
    """Bounds of pieces of at most `longest` characters, cut after a newline if the second half has one."""
    start = 0
    while len(text) - start > longest:
        stop = text.rfind("\n", start + longest // 2, start + longest) + 1 or start + longest
        yield start, stop
        start = stop
    yield start, len(text)


def divide(records: Iterable[Record], longest: int) -> Iterator[Record]:
    """Records whose texts have at most `longest` characters."""
    for record in records:
        if record.text is None or len(record.text) <= longest:
            yield record
            continue
        for start, stop in cuts(record.text, longest):
            yield Record(record.line, record.text[start:stop], "", start == 0, stop == len(record.text))
