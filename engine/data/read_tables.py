"""Tables to records: CSV and TSV, with a header unless the schema knows better, and Parquet."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from typing import Any

from engine.data.encodings import SAMPLE_BYTES, Stream
from engine.data.records import LONGEST_RECORD, Record, Schema, SourceFile, to_record
from model.errors import InputError

_csv_limit = threading.Lock()


def table(stream: Stream, file: SourceFile, schema: Schema) -> Iterator[Record]:
    """CSV or TSV with a header. Undecodable bytes become surrogates, which later refuse their record alone.

    A row of CSV is what its quotes make it; one of TSV is a line, and a quote there is a character like any other.
    A broken row costs its first line: an opening quote without its partner would otherwise take the rest of the file
    along.
    """
    lines = _Lines(stream)
    rows: Iterator[list[str]]
    if file.format == "tsv":
        rows = map(_tab_separated, lines)
    else:
        with _csv_limit:
            csv.field_size_limit(LONGEST_RECORD)
        rows = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        line = lines.number
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            lines.skip_one()
            yield Record(line, None, f"broken table row: {error}")
            continue
        if row and header is not None and len(row) != len(header):
            lines.skip_one()
            yield Record(line, None, f"{len(row)} columns where the header has {len(header)}")
            continue
        lines.accept()
        if row and header is None:
            header = list(schema.header(row))
            if header == row:
                continue
        if row:
            assert header is not None
            yield to_record(line, dict(zip(header, row, strict=True)), schema)


def _tab_separated(line: str) -> list[str]:
    line = line.removesuffix("\n").removesuffix("\r")
    return line.split("\t") if line else []


class _Lines:
    """Lines of a table, kept from the beginning of the row that is being read, to begin again behind its first.

    number: of the row's first line, from 1.
    """

    def __init__(self, stream: Stream) -> None:
        self.number = 1
        self._stream = stream
        self._kept = bytearray()  # from the row's beginning on
        self._position = 0  # what follows in `_kept` is still to be handed out
        self._count = 0  # lines handed out of this row

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """
        Raises:
            csv.Error: the row has no end.
        """
        stop = self._kept.find(b"\n", self._position) + 1
        if not stop:
            self._kept += self._stream.readline(LONGEST_RECORD + 1 - len(self._kept))
            stop = len(self._kept)
        if stop > LONGEST_RECORD:
            raise csv.Error(f"it does not end within {LONGEST_RECORD >> 20} MiB")
        if stop == self._position:
            if stop:
                raise csv.Error("a quote is opened and never closed")
            raise StopIteration
        line = self._kept[self._position : stop].decode(self._stream.codec, "surrogateescape")
        self._position = stop
        self._count += 1
        return line

    def accept(self) -> None:
        """The row is done; the next one begins behind it."""
        self._begin(self._position, self._count)

    def skip_one(self) -> None:
        """The row is broken; the next one begins behind its first line."""
        stop = self._kept.find(b"\n") + 1
        if not stop:
            # Of a line longer than any record, the rest is still to come.
            stop = len(self._kept)
            while (piece := self._stream.readline(SAMPLE_BYTES)) and not piece.endswith(b"\n"):
                pass
        self._begin(stop, 1)

    def _begin(self, position: int, lines: int) -> None:
        del self._kept[:position]
        self._position = self._count = 0
        self.number += lines


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


def parquet(file: SourceFile, schema: Schema, start: int, end: int | None) -> Iterator[Record]:
    import pyarrow

    with open_parquet(file.path) as table:
        groups = range(start, table.num_row_groups if end is None else end)
        row = sum(table.metadata.row_group(group).num_rows for group in range(start))
        try:
            columns = schema.columns(table.schema_arrow.names)
            for batch in table.iter_batches(256, row_groups=[*groups], columns=columns):
                for value in batch.to_pylist():
                    row += 1
                    yield to_record(row, value, schema)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{file.path}: damaged after row {row} ({error}). Fetch the file again.") from None
