"""Tables to records: CSV and TSV with a header, and Parquet."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from engine.data.encodings import Stream
from engine.data.records import LONGEST_RECORD, TEXT_FIELDS, Record, SourceFile, to_record
from model.errors import InputError

_csv_limit = threading.Lock()


def table(stream: Stream, file: SourceFile, fields: Sequence[str]) -> Iterator[Record]:
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
            yield to_record(line, dict(zip(header, row, strict=True)), fields)


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


def parquet(file: SourceFile, fields: Sequence[str], start: int, end: int | None) -> Iterator[Record]:
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
                    yield to_record(row, value, fields)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{file.path}: damaged after row {row} ({error}). Fetch the file again.") from None
