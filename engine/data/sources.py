"""From the paths that a user names to files with a known format, encoding and unit of text."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TypeVar

from engine.data.encodings import SAMPLE_BYTES, Encoding, Stream, detect_encoding
from engine.data.reading import check_first_records, read_records
from engine.data.records import FOREIGN_BYTE, Document, Format, Record, Schema, SourceFile, TextSchema
from engine.data.shards import PLAN
from model.errors import InputError

FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".json": "json_lines",
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
KNOWN = "txt, json, jsonl, ndjson, csv, tsv, parquet, and .gz or .zst of these"

# A text file up to this size is taken for one document: the largest of 59 Chinese classics has 1.3 MB, a
# textbook 3 MB. What is larger is a collection.
BOOK_BYTES = 4 << 20
# Blank lines divide a collection into documents if there is at least one in this many bytes.
PARAGRAPH_BYTES = 64 << 10


class FileOptions(Protocol):
    """How files are read: dataclasses, one for texts and one for conversations.

    counts: what is counted of each file.
    """

    encoding: Encoding
    newlines: Literal["keep", "unix"]
    on_error: Literal["skip", "fail"]
    counts: ClassVar[tuple[str, ...]]

    @property
    def schema(self) -> Schema: ...

    def bare(self) -> FileOptions:
        """These options without those of a recipe that contains them: nothing else may change a preparation."""
        ...

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        """What one document of a .txt file is.

        Raises:
            InputError: such a file has none.
        """
        ...

    def is_short(self, record: Record) -> bool:
        """Whether a record is left out although nothing is wrong with it."""
        ...


Options = TypeVar("Options")


def only(kind: type[Options], options: FileOptions) -> Options:
    """Those of some options that a class of options has."""
    names = [option.name for option in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(options, name) for name in names})


@dataclass
class ReadOptions:
    """How raw files become documents."""

    counts: ClassVar[tuple[str, ...]] = ("documents", "characters", "rejected", "short", "divided")

    fields: list[str] = field(default_factory=list)
    """record fields joined by newlines to one document; by default the text field is found by its name"""
    document: Literal["auto", "file", "paragraph", "line"] = "auto"
    """what one document of a .txt file is; auto: the file up to 4 MiB, beyond it a paragraph or a line"""
    encoding: Encoding = "auto"
    """encoding of all files; auto detects UTF-8, UTF-16 (with mark), GBK and GB18030 file by file"""
    newlines: Literal["keep", "unix"] = "keep"
    """unix: turn \\r\\n and \\r into \\n; keep: leave text exactly as it is"""
    min_characters: int = 10
    """documents with fewer, spaces at both ends not counted, are dropped"""
    on_error: Literal["skip", "fail"] = "skip"
    """a malformed record is written to rejects.jsonl and skipped, or ends the job"""
    max_characters: int = 1_000_000
    """longer documents are stored in several pieces, cut at ends of lines"""

    def __post_init__(self) -> None:
        if self.min_characters < 1:
            raise InputError(f"--data.min_characters is {self.min_characters}. Use at least 1.")
        if self.max_characters < 1000:
            raise InputError(f"--data.max_characters is {self.max_characters}. Use at least 1000.")

    @property
    def schema(self) -> Schema:
        return TextSchema(tuple(self.fields), self.max_characters)

    def bare(self) -> ReadOptions:
        return only(ReadOptions, self)

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        if self.document != "auto":
            return self.document
        if len(sample) < SAMPLE_BYTES or (not file.compression and file.size <= BOOK_BYTES):
            return "file"
        blank_lines = sum(not line.strip(b" \t\r") for line in sample.split(b"\n"))
        return "paragraph" if blank_lines * PARAGRAPH_BYTES >= len(sample) else "line"

    def is_short(self, record: Record) -> bool:
        """Whether a record is a whole document of too few characters."""
        assert record.text is not None
        return record.is_first and record.is_last and len(record.text.strip()) < self.min_characters


@dataclass
class DataOptions(ReadOptions):
    """Which files, and how they are read."""

    paths: list[str] = field(default_factory=list)
    """files, directories or glob patterns of raw text, or prepared directories"""


@dataclass(frozen=True)
class Listing:
    """All files of a run, in order, before any of them is opened.

    ignored: files in the given directories that are of no known kind.
    """

    paths: tuple[str, ...]
    files: tuple[SourceFile, ...]
    ignored: int

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)


def list_files(paths: Sequence[str | os.PathLike[str]]) -> Listing:
    """Expand files, directories (recursively) and glob patterns.

    The order is that of the arguments, and by name below each; it does not depend on the filesystem.

    Raises:
        InputError: nothing given, nothing there, an unknown kind of file, or one file reached twice.
    """
    if not paths:
        raise InputError("There is no data. Name files or directories with --data.")
    files: list[SourceFile] = []
    seen: dict[str, str] = {}
    ignored = 0
    for source, argument in enumerate(_names(paths)):
        is_directory = os.path.isdir(argument)
        found = 0
        for path, name in _expand(argument):
            kind = _kind(path)
            if kind is None:
                if not is_directory:
                    raise InputError(f"{path}: not a known kind of file. Readable are: {KNOWN}.")
                ignored += 1
                continue
            real = os.path.realpath(path)
            if real in seen:
                raise InputError(
                    f"{path}: listed twice, by {seen[real]} and by {argument}. List it once; weights repeat a source."
                )
            seen[real] = argument
            files.append(SourceFile(path, name, source, os.path.getsize(path), *kind))
            found += 1
        if not found and os.path.isfile(os.path.join(argument, PLAN)):
            raise InputError(
                f"{argument}: its preparation has not ended. Run its tools/prepare.py command again to finish it."
            )
        if not found:
            raise InputError(f"{argument}: no readable file is in it. Readable are: {KNOWN}.")
    return Listing(_names(paths), tuple(files), ignored)


def _names(paths: Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    return tuple(os.fspath(path) for path in paths)


def _expand(argument: str) -> Iterator[tuple[str, str]]:
    """Path and name of every file below an argument."""
    if os.path.isfile(argument):
        yield argument, os.path.basename(argument)
    elif os.path.isdir(argument):
        found = []
        visited = set()
        for folder, folders, names in os.walk(argument, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:
                folders.clear()
                continue
            visited.add(real)
            if PLAN in names:  # what an earlier preparation made is no raw text
                folders.clear()
                continue
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        for file in sorted(found, key=lambda file: file.parts):
            yield str(file), file.relative_to(argument).as_posix()
    elif matches := sorted(glob.glob(argument, recursive=True)):
        for match in matches:
            for path, name in _expand(match):
                yield path, f"{os.path.basename(match)}/{name}" if os.path.isdir(match) else name
    else:
        raise InputError(f"{argument}: no such file or directory. Check the path after --data.")


def _kind(path: str) -> tuple[str, Format] | None:
    """Compression and format by the file's name."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix, "")
    kind = FORMATS.get(os.path.splitext(stem)[1] if compression else suffix)
    return None if kind is None or (compression and kind == "parquet") else (compression, kind)


def probe(file: SourceFile, options: FileOptions) -> SourceFile:
    """Open a file and find out how to read it.

    Raises:
        InputError: binary, of no known encoding, not what its name says, or without a text field.
    """
    if file.format == "parquet":
        check_first_records(file, options.schema)
        return file
    file = dataclasses.replace(file, encoding=detect_encoding(file.path, file.compression, options.encoding))
    with Stream(file.path, file.compression, file.encoding) as stream:
        sample = stream.read(SAMPLE_BYTES)
    if file.format == "text":
        return dataclasses.replace(file, document=options.document_of(file, sample))
    if file.format == "json_lines":
        if sample.lstrip()[:1] == b"[":
            file = dataclasses.replace(file, format="json_list")
        elif _is_one_object(sample):
            raise InputError(
                f"{file.path}:1: one JSON object over several lines. Make it a list of records, or one record a line."
            )
    if sample.strip():
        check_first_records(file, options.schema)
    return file


def _is_one_object(sample: bytes) -> bool:
    """A first line that opens an object and does nothing else."""
    return sample.lstrip().partition(b"\n")[0].strip() == b"{"


def read_texts(paths: Sequence[str | os.PathLike[str]], options: ReadOptions | None = None) -> Iterator[str]:
    """The documents of raw files as plain strings, for whoever only wants to read: a tokenizer's training, a count.

    Malformed and too short ones are left out; `prepare` and `check` are what counts them.

    Raises:
        InputError: as `list_files` and `probe`; with on_error "fail" also for a malformed record.
    """
    options = options or ReadOptions()
    for listed in list_files(paths).files:
        file = probe(listed, options)
        for record in read_records(file, options.schema):
            record = settle(record, options)
            if record.text is None:
                if options.on_error == "fail":
                    raise malformed(file.path, record.line, record.reason)
            elif not options.is_short(record):
                yield record.text


def settle(record: Record, options: FileOptions) -> Record:
    """A record under the newline policy, refused if its text cannot be tokenised exactly."""
    text = record.text
    if text is None:
        return record
    if reason := refusal(text):
        return record._replace(text=None, reason=reason)
    return record._replace(text=unix_newlines(text)) if options.newlines == "unix" else record


def unix_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def malformed(path: str, line: int, reason: str) -> InputError:
    """What ends a job under `on_error fail`."""
    return InputError(f"{path}:{line}: {reason}. Mend the record, or skip such ones with --data.on_error skip.")


def refusal(text: str) -> str:
    """Why a text cannot be tokenised exactly; "" where it can."""
    if "\0" in text:
        return "the text holds NUL"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if 0xDC80 <= ord(text[error.start]) <= 0xDCFF:
            return f"character {error.start + 1} of the text is {FOREIGN_BYTE}"
        return f"character {error.start + 1} of the text is half a surrogate pair"
    return ""
