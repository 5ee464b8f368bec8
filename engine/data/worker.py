"""One unit of text to one shard of tokens; as a program, a process that does nothing else.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from engine.data.encodings import count_newlines
from engine.data.reading import read_records
from engine.data.records import Record, SourceFile
from engine.data.shards import UnitWriter, text_hash
from engine.data.sources import ReadOptions, is_short, malformed, settle
from engine.data.units import Segment, Unit
from model.errors import InputError

# Texts are encoded some at a time: ids are Python objects on their way into an array.
_BATCH_TEXTS = 256
_BATCH_CHARACTERS = 1 << 16


class TextEncoder(Protocol):
    """What preparation needs of a tokenizer."""

    vocab_size: int
    eos_id: int
    add_bos: bool

    @property
    def bos_id(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: list[str], /) -> list[list[int]]: ...

    def save(self, directory: Path, /) -> None: ...


@dataclass(frozen=True)
class Setting:
    """What all units of a preparation share."""

    directory: Path
    options: ReadOptions
    dtype: str


def tokenise(unit: Unit, files: Mapping[int, SourceFile], tokenizer: TextEncoder, setting: Setting) -> dict[str, Any]:
    """Read, tokenise and commit one unit.

    Returns:
        the unit's facts: documents, tokens, digests, and what each of its files gave.
    Raises:
        InputError: a file is damaged as a whole, or a record is malformed under `on_error fail`.
    """
    dtype = np.dtype(setting.dtype)
    begin = [tokenizer.bos_id] if tokenizer.add_bos else []
    found: dict[int, dict[str, int]] = {}
    writer = UnitWriter(setting.directory, unit.index, dtype)
    try:
        for batch in _batches(_documents(unit, files, setting.options, found, writer.reject)):
            for record, ids in zip(batch, tokenizer.encode_batch([record.text for record in batch]), strict=True):  # type: ignore[misc]
                assert record.text is not None
                whole = [*(begin if record.is_first else []), *ids, *([tokenizer.eos_id] if record.is_last else [])]
                writer.add(np.array(whole, dtype), len(record.text), text_hash(record.text))
        counts = [{"file": file, **numbers} for file, numbers in sorted(found.items())]
        return writer.commit({"files": counts})
    except BaseException:
        writer.abandon()
        raise


def _documents(
    unit: Unit,
    files: Mapping[int, SourceFile],
    options: ReadOptions,
    found: dict[int, dict[str, int]],
    reject: Callable[[dict[str, Any]], None],
) -> Iterator[Record]:
    """Usable records; the others are counted."""
    for segment in unit.segments:
        file = files[segment.file]
        numbers = found.setdefault(
            segment.file, dict.fromkeys(("documents", "characters", "rejected", "short", "divided"), 0)
        )
        for record in map(lambda record: settle(record, options), _records(segment, file, options)):
            if record.text is None:
                start = 0 if file.format == "parquet" else segment.start
                if options.on_error == "fail":
                    raise malformed(file.path, record.line + count_newlines(file.path, start), record.reason)
                numbers["rejected"] += 1
                reject({"file": segment.file, "start": start, "line": record.line, "reason": record.reason})
            elif is_short(record, options):
                numbers["short"] += 1
            else:
                numbers["documents"] += 1
                numbers["characters"] += len(record.text)
                numbers["divided"] += record.is_first and not record.is_last
                yield record


def _records(segment: Segment, file: SourceFile, options: ReadOptions) -> Iterator[Record]:
    if segment.records is not None:
        return iter(segment.records)
    return read_records(file, options.fields, options.max_characters, segment.start, segment.end)


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text or "")
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
    """Answer jobs until the feeding process closes the pipe: (setting, tokenizer) once, then (unit, files)."""
    # Ctrl-C reaches the whole group; the feeding process decides what becomes of us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    jobs = sys.stdin.buffer
    try:
        setting, tokenizer = receive(jobs)
        while True:
            unit, files = receive(jobs)
            try:
                answer: tuple[str, Any] = ("done", tokenise(unit, files, tokenizer, setting))
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
