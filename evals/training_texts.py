"""Whatever a model was trained on, as one stream of text: raw files of any kind, and prepared directories."""

from __future__ import annotations

import codecs
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from engine.data.corpus import Store
from engine.data.encodings import Stream
from engine.data.reading import read_records
from engine.data.records import Document, SourceFile
from engine.data.shards import TRAINED, Prepared, prepared_parts
from engine.data.sources import ReadOptions, list_files, probe
from model.errors import InputError
from model.tokenizer import Tokenizer

# What is handed on at once: characters of a record, bytes of a text.
_LONGEST_PIECE, _PIECE_BYTES = 1 << 18, 1 << 19


class Piece(NamedTuple):
    """Some text.

    file, line: where it begins; of a prepared directory its name and the number of the document in it, from 1.
    is_first: False where it goes on with the piece before.
    has_lines: whether newlines in it are those of the file.
    """

    file: str
    line: int
    text: str
    is_first: bool
    has_lines: bool


def check_training_texts(paths: Sequence[str | os.PathLike[str]]) -> None:
    """See that there is something to read below every path, without reading it.

    Raises:
        InputError: nothing there, or a file of an unknown kind.
    """
    for path in paths:
        if not os.path.exists(path) and not glob.glob(os.fspath(path), recursive=True):
            raise InputError(f"{path}: no such file or directory. Check the path after --contamination.")
        if not any(prepared_parts(path)):
            list_files([path])


def read_training_texts(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Piece]:
    """All text below some paths, in memory that does not grow with it.

    Of a record every text counts, whatever its field is called, one after the other; a .txt file is one text, so that
    lines may break anywhere. Records that cannot be read are passed over, as in training, and bytes that are not in a
    file's encoding.

    Args:
        paths: files, directories or glob patterns of raw texts, conversations or comparisons, and prepared directories.
    Raises:
        InputError: nothing there, a file of an unknown kind, or a damaged one.
    """
    if not paths:
        raise InputError("There are no training texts to look through. Name files or directories.")
    check_training_texts(paths)
    for path in paths:
        parts = list(prepared_parts(path))
        for part in parts:
            yield from _read_prepared(part)
        if not parts:
            options = _Everything()
            for listed in list_files([path]).files:
                file = probe(listed, options)
                yield from _read_text(file) if file.format == "text" else _read_records(file, options)


class _EveryText:
    """A record's text is all texts in it."""

    advice: ClassVar[str] = ""

    @property
    def longest(self) -> int:
        return _LONGEST_PIECE

    def text(self, value: Any) -> str:
        return "\n".join(_texts(value))

    def columns(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        # Names that no row has: the first row is read as any other, in case it is one.
        return [str(column) for column in range(-len(first_row), 0)]


class _Everything(ReadOptions):
    @property
    def schema(self) -> _EveryText:
        return _EveryText()

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        return "file"


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return []
    return [text for part in value for text in _texts(part)]


def _read_text(file: SourceFile) -> Iterator[Piece]:
    line, is_first = 1, True
    with Stream(file.path, file.compression, file.encoding) as stream:
        decoder = codecs.getincrementaldecoder(stream.codec)("replace")
        while piece := stream.read(_PIECE_BYTES):
            text = decoder.decode(piece)
            yield Piece(file.path, line, text, is_first, has_lines=True)
            line, is_first = line + text.count("\n"), False


def _read_records(file: SourceFile, options: _Everything) -> Iterator[Piece]:
    for record in read_records(file, options.schema):
        if record.text is not None:
            yield Piece(file.path, record.line, record.text, record.is_first, has_lines=False)


def _read_prepared(directory: Path) -> Iterator[Piece]:
    tokenizer = Tokenizer.load(directory / "tokenizer")
    store = Store([[Prepared(directory)]])
    for document in range(len(store)):
        ids = store.read(document)
        text = tokenizer.decode((ids & ~ids.dtype.type(TRAINED)).tolist() if ids.itemsize == 4 else ids.tolist())
        yield Piece(str(directory), document + 1, text, is_first=True, has_lines=False)
