"""A corpus cut into units of work, each of which is tokenised and committed by itself.

Where the cuts fall depends on the files and the unit's size alone, never on who works on them, so units can be
shared out over processes and machines and finished in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.data.encodings import SAMPLE_BYTES, Stream, open_raw
from engine.data.read_tables import open_parquet
from engine.data.reading import read_stream
from engine.data.records import Record, SourceFile
from engine.data.sources import FileOptions

UNIT_BYTES = 16 << 20
# Larger corpora get larger units, so that a corpus has some thousands of them and not millions.
MOST_UNITS = 4096
MOST_FILES = 4096
# Text that has been read already waits in memory: this much of it makes a unit.
READ_AHEAD_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class Segment:
    """Part of a file.

    file: index into the corpus's files.
    start, end: bytes (row groups, for Parquet); None: to the file's end.
    records: what is there, where only reading from the file's beginning could find it.
    """

    file: int
    start: int = 0
    end: int | None = None
    records: tuple[Record, ...] | None = None


@dataclass
class Unit:
    """Segments that are tokenised into one shard.

    size: bytes on disk, for progress.
    """

    index: int
    segments: list[Segment] = field(default_factory=list)
    size: int = 0


def unit_size(total_bytes: int) -> int:
    """Bytes of a unit for a corpus of so many bytes."""
    return max(UNIT_BYTES, -(-total_bytes // MOST_UNITS))


def cut(
    files: Sequence[SourceFile], options: FileOptions, size: int, is_wanted: Callable[[int], bool]
) -> Iterator[Unit]:
    """Units of a corpus, in order; those that are not wanted come without records.

    Files smaller than a unit share one. A larger file is entered at ends of records where its format allows that;
    otherwise it is read here, once, and its records travel inside the units.
    """
    unit = Unit(0)
    for index, file in enumerate(files):
        # Compressed text is some four times larger than its file.
        if file.size * (4 if file.compression else 1) <= size:
            unit.segments.append(Segment(index))
            unit.size += file.size
            if unit.size >= size or len(unit.segments) >= MOST_FILES:
                yield unit
                unit = Unit(unit.index + 1)
            continue
        if unit.segments:
            yield unit
            unit = Unit(unit.index + 1)
        parts = _ranges(index, file, size) if file.is_seekable else _read_ahead(index, file, options)
        for segment, part_size in parts:
            if segment.records is not None and not is_wanted(unit.index):
                segment = Segment(index, records=())
            yield Unit(unit.index, [segment], part_size)
            unit = Unit(unit.index + 1)
    if unit.segments:
        yield unit


def _ranges(index: int, file: SourceFile, size: int) -> Iterator[tuple[Segment, int]]:
    if file.format == "parquet":
        yield from _row_groups(index, file, size)
        return
    start = 0
    while start < file.size:
        end = _record_end(file, start + size)
        yield Segment(index, start, end), end - start
        start = end


def _record_end(file: SourceFile, offset: int) -> int:
    """The first end of a record at or after byte `offset`."""
    with open_raw(file.path) as stream:
        stream.seek(offset)
        while line := stream.readline(SAMPLE_BYTES):
            position = stream.tell()
            if not line.endswith(b"\n"):
                continue
            # What was read may be the end of a longer line; only a whole blank line divides paragraphs.
            is_blank = not line.strip(b" \t\r\n") and _begins_line(file, position - len(line))
            if file.document != "paragraph" or is_blank:
                return position
    return file.size


def _begins_line(file: SourceFile, position: int) -> bool:
    assert position > 0
    with open_raw(file.path) as stream:
        stream.seek(position - 1)
        return stream.read(1) == b"\n"


def _row_groups(index: int, file: SourceFile, size: int) -> Iterator[tuple[Segment, int]]:
    with open_parquet(file.path) as table:
        count = table.num_row_groups
        sizes = [
            sum(group.column(column).total_compressed_size for column in range(group.num_columns))
            for group in map(table.metadata.row_group, range(count))
        ]
    start = 0
    while start < count:
        end = start + 1
        while end < count and sum(sizes[start : end + 1]) <= size:
            end += 1
        yield Segment(index, start, end), sum(sizes[start:end])
        start = end


def _read_ahead(index: int, file: SourceFile, options: FileOptions) -> Iterator[tuple[Segment, int]]:
    records: list[Record] = []
    characters = 0
    consumed = 0
    with Stream(file.path, file.compression, file.encoding) as stream:
        for record in read_stream(stream, file, options.schema):
            records.append(record)
            characters += len(record.text or record.reason) + 64
            if characters >= READ_AHEAD_CHARACTERS:
                position = stream.consumed()
                segment = Segment(index, records=tuple(records))
                records, characters = [], 0
                yield segment, position - consumed
                consumed = position
    if records:
        yield Segment(index, records=tuple(records)), file.size - consumed
