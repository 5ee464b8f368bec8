"""Documents of one file, one at a time, in memory that does not grow with the file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from engine.data.encodings import Stream
from engine.data.read_json import json_lines, json_list
from engine.data.read_tables import parquet, table
from engine.data.read_text import read_lines, split_text
from engine.data.records import FOREIGN_BYTE, Record, Schema, SourceFile, divide
from model.errors import InputError

_PROBED_RECORDS = 100


def read_records(file: SourceFile, schema: Schema, start: int = 0, end: int | None = None) -> Iterator[Record]:
    """Documents of a file, or of a part of it.

    Args:
        schema: makes texts of records; one longer than `schema.longest` is divided at ends of lines where it can be.
        start, end: bytes of a seekable file, at ends of records (row groups, for Parquet).
    Raises:
        InputError: the file is damaged as a whole, so that its records cannot be told apart.
    """
    if file.format == "parquet":
        yield from divide(parquet(file, schema, start, end), schema.longest)
        return
    with Stream(file.path, file.compression, file.encoding) as stream:
        yield from read_stream(stream, file, schema, start, end)


def read_stream(
    stream: Stream, file: SourceFile, schema: Schema, start: int = 0, end: int | None = None
) -> Iterator[Record]:
    """`read_records` on an open stream, for a caller that wants to watch how far it got."""
    if start:
        stream.seek(start)
    if file.format == "text":
        assert file.document, "a text file is probed before it is read"
        yield from split_text(read_lines(stream, start, end), stream.codec, file.document, schema.longest)
    elif file.format == "json_lines":
        yield from divide(json_lines(stream, start, end, schema), schema.longest)
    elif file.format == "json_list":
        yield from divide(json_list(stream, file.path, schema), schema.longest)
    else:
        yield from divide(table(stream, file, schema), schema.longest)


def check_first_records(file: SourceFile, schema: Schema) -> None:
    """Refuse a file none of whose first records has a text.

    Raises:
        InputError: names the first record's line and what it holds.
    """
    if file.format == "text":
        return
    records = list(itertools.islice(read_records(file, schema), _PROBED_RECORDS))
    if records and all(record.text is None for record in records):
        first = records[0]
        is_misread = first.reason.endswith(FOREIGN_BYTE)
        advice = "Leave --data.encoding out: it is found file by file." if is_misread else schema.advice
        raise InputError(f"{file.path}:{first.line}: {first.reason}. {advice}")
