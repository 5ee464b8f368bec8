"""What the checks of texts, conversations and comparisons share: files read through, and what is left out of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.data.prepare import Progress
from engine.data.reading import read_records
from engine.data.records import Record
from engine.data.report import counts, unless_zero, without_numbers
from engine.data.sources import FileOptions, list_files, malformed, probe
from model.errors import InputError

_EXAMPLES = 3  # places named for each fault


@dataclass
class FilesReport:
    """Facts about files and their records.

    files, encodings, formats: files of each kind. ignored_files: of other kinds.
    unusable: of the files, and of held-out ones, those that cannot be read: why, in a sentence each.
    read: records that could be read.
    tokens: None where they are not counted.
    faults: records that are left out, by reason with numbers left out of it; reasons: the first of each, with its
        numbers; places: of some, as "file:line: reason".
    held_out, overlap: held-out records, and how many of them are also here; None without.
    """

    files: int = 0
    ignored_files: int = 0
    unusable: list[str] = field(default_factory=list)
    encodings: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    read: int = 0
    tokens: int | None = None
    faults: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    held_out: int | None = None
    overlap: int | None = None

    def fault(self, place: str, reason: str) -> None:
        """A record is left out."""
        kind = without_numbers(reason)
        self.faults[kind] += 1
        self.reasons.setdefault(kind, reason)
        self.see(kind, f"{place}: {reason}")

    def see(self, kind: str, place: str) -> None:
        """Where something is found, for the first few places."""
        places = self.places.setdefault(kind, [])
        if len(places) < _EXAMPLES:
            places.append(place)

    def file_rows(self) -> list[tuple[str, str]]:
        """What the files are: names and values."""
        others = unless_zero(len(self.unusable), "unusable") + unless_zero(self.ignored_files, "of other kinds ignored")
        return [
            ("files", f"{self.files:,} ({counts(self.formats) or 'none is readable'}){others}"),
            ("encodings", counts(self.encodings) or "none"),
        ]

    def fault_rows(self, name: str) -> list[tuple[str, str]]:
        """What is left out, under a name, and why."""
        rows = [(name, f"{self.faults.total():,}")]
        for kind, count in self.faults.most_common():
            rows += [
                ("", f"{count:,} x {self.reasons[kind]}"),
                *(("", f"  e.g. {place}") for place in self.places[kind]),
            ]
        return rows


def read_files(
    paths: Sequence[str], options: FileOptions, report: FilesReport, progress: Callable[[Progress], None] | None
) -> Iterator[tuple[str, Record]]:
    """Every record of raw files, readable or not, with its file; what the files are goes into the report.

    A file that is unusable, from its beginning or from somewhere on, goes into the report too, and others are read.
    """
    listing = list_files(paths)
    report.files, report.ignored_files = len(listing.files), listing.ignored
    began, done = time.monotonic(), 0
    for listed in listing.files:
        try:
            file = probe(listed, options)
            report.encodings[file.encoding or "utf-8"] += 1
            report.formats[file.format] += 1
            for record in read_records(file, options.schema):
                report.read += record.text is not None
                yield file.path, record
        except InputError as error:
            report.unusable.append(str(error))
        done += listed.size
        if progress is not None:
            progress(Progress(done, listing.size, 0, report.read, report.tokens or 0, time.monotonic() - began))


def leave_out(report: FilesReport, options: FileOptions, file: str, line: int, reason: str) -> None:
    """Count a record among the faults.

    Raises:
        InputError: options say that one is enough.
    """
    if options.on_error == "fail":
        raise malformed(file, line, reason)
    report.fault(f"{file}:{line}", reason)
