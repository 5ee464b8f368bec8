"""One unit of records to one shard of tokens; as a program, a process that does nothing else.

`python -m engine.data.worker` reads pickled jobs from its standard input and answers on its standard output. It is
a program of its own, and no fork, so that it inherits neither threads nor a GPU nor hundreds of megabytes, and so
that it ends with the process that feeds it. It must not import torch.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.data.encoders import Encoder
from engine.data.encodings import count_newlines
from engine.data.reading import read_records
from engine.data.records import Record, SourceFile
from engine.data.shards import UnitWriter
from engine.data.sources import FileOptions, malformed, settle
from engine.data.units import Segment, Unit
from model.errors import InputError

# Texts are encoded some at a time: ids are Python objects on their way into an array.
_BATCH_TEXTS = 256
_BATCH_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Setting:
    """What all units of a preparation share."""

    directory: Path
    options: FileOptions


class _Read(NamedTuple):
    """A record, and the segment that it was read from."""

    segment: Segment
    record: Record


def tokenise(unit: Unit, files: Mapping[int, SourceFile], encoder: Encoder, setting: Setting) -> dict[str, Any]:
    """Read, tokenise and commit one unit.

    Returns:
        the unit's facts: documents, tokens, digests, and what each of its files gave.
    Raises:
        InputError: a file is damaged as a whole, or a record is malformed under `on_error fail`.
    """
    found: dict[int, dict[str, int]] = {}
    writer = UnitWriter(setting.directory, unit.index, encoder.dtype)

    def reject(segment: Segment, record: Record, reason: str) -> None:
        file = files[segment.file]
        start = 0 if file.format == "parquet" else segment.start
        if setting.options.on_error == "fail":
            raise malformed(file.path, record.line + count_newlines(file.path, start), reason)
        found[segment.file]["rejected"] += 1
        writer.reject({"file": segment.file, "start": start, "line": record.line, "reason": reason})

    try:
        for batch in _batches(_usable(unit, files, setting.options, found)):
            outcomes = encoder.encode([record for _, record in batch if record.text is not None])
            for segment, record in batch:
                stored = None if record.text is None else next(outcomes)
                if stored is None or stored.ids is None:
                    reject(segment, record, record.reason if stored is None else stored.reason)
                    continue
                writer.add(stored.ids, stored.characters, stored.digest)
                numbers = found[segment.file]
                for name, number in {"documents": 1, "characters": stored.characters, **stored.counts}.items():
                    numbers[name] += number
        counts = [{"file": file, **numbers} for file, numbers in sorted(found.items())]
        return writer.commit({"files": counts})
    except BaseException:
        writer.abandon()
        raise


def _usable(
    unit: Unit, files: Mapping[int, SourceFile], options: FileOptions, found: dict[int, dict[str, int]]
) -> Iterator[_Read]:
    """Records to be encoded or rejected; those that are too short are counted."""
    for segment in unit.segments:
        numbers = found.setdefault(segment.file, dict.fromkeys(options.counts, 0))
        for record in _records(segment, files[segment.file], options):
            record = settle(record, options)
            if record.text is not None and options.is_short(record):
                numbers["short"] += 1
            else:
                yield _Read(segment, record)


def _records(segment: Segment, file: SourceFile, options: FileOptions) -> Iterator[Record]:
    if segment.records is not None:
        return iter(segment.records)
    return read_records(file, options.schema, segment.start, segment.end)


def _batches(records: Iterator[_Read]) -> Iterator[list[_Read]]:
    batch: list[_Read] = []
    characters = 0
    for read in records:
        batch.append(read)
        characters += len(read.record.text or "")
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# The process


def send(stream: BinaryIO, message: Any) -> None:
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message.

    Raises:
        EOFError: the other side is gone.
    """
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", header)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """Answer jobs until the feeding process closes the pipe: (setting, encoder) once, then (unit, files)."""
    # Ctrl-C reaches the whole group; the feeding process decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    jobs = sys.stdin.buffer
    try:
        setting, encoder = receive(jobs)
        while True:
            unit, files = receive(jobs)
            try:
                answer: tuple[str, Any] = ("done", tokenise(unit, files, encoder, setting))
            except InputError as error:
                answer = ("refused", str(error))
            except OSError as error:
                answer = ("system", error)
            except Exception:
                answer = ("failed", traceback.format_exc())
            send(answers, answer)
    except (EOFError, BrokenPipeError):
        return


if __name__ == "__main__":
    main()
