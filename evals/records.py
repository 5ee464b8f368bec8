"""The records of test files as they stand there, with all fields: json, jsonl, csv, tsv, parquet, in any encoding."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from engine.data.reading import read_records
from engine.data.records import Document, RecordError, Schema, SourceFile, kind_of
from engine.data.sources import ReadOptions, list_files, probe
from model.errors import InputError

_ADVICE = "Mend the record, or give a file of the task's own format (docs/evaluation.md)."


class Value(NamedTuple):
    """A record. line: where it begins. value: as JSON has it. reason: why it cannot be used; "" where it can."""

    line: int
    value: Any
    reason: str


def listed(path: Path) -> SourceFile:
    """A file by its path. Raises InputError: it is not there, or a directory."""
    if path.is_dir():
        raise InputError(f"{path}: this is a directory, and a file is wanted. Name one of the files in it.")
    if not path.is_file():
        raise InputError(f"{path}: there is no such file. Check the path.")
    [file] = list_files([path]).files
    return file


def read_values(file: SourceFile, takes_any: bool = False) -> Iterator[Value]:
    """The records of a file, those that cannot be used too.

    Args:
        takes_any: whether a record may be something else than an object.
    Raises:
        InputError: the file is damaged, or none of its first records can be used.
    """
    options = _Options(takes_any=takes_any)
    for record in read_records(probe(file, options), options.schema):
        yield Value(record.line, None if record.text is None else json.loads(record.text), record.reason)


@dataclass(frozen=True)
class _Schema:
    """A record's text is the record itself, in JSON."""

    takes_any: bool
    longest: int = 1 << 62  # never divided
    advice: ClassVar[str] = _ADVICE

    def text(self, value: Any) -> str:
        if not self.takes_any and not isinstance(value, dict):
            raise RecordError(f"a record is an object, this one is {kind_of(value)}")
        return json.dumps(value, default=str)  # a date, in Parquet

    def columns(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        return first_row


@dataclass
class _Options(ReadOptions):
    takes_any: bool = False

    @property
    def schema(self) -> Schema:
        return _Schema(self.takes_any)

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        raise InputError(f"{file.path}: a text has no records. {_ADVICE}")
