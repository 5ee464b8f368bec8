"""Plain text to documents: a file, its paragraphs or its lines. One bad line costs one document."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from engine.data.encodings import SAMPLE_BYTES, Stream
from engine.data.records import Document, Record, cuts


def read_lines(stream: Stream, start: int, end: int | None) -> Iterator[bytes]:
    """Lines with their ends; one that is longer than a sample comes in several pieces."""
    position = start or stream.begin
    while (end is None or position < end) and (line := stream.readline(SAMPLE_BYTES)):
        position += len(line)
        yield line


def split_text(lines: Iterable[bytes], codec: str, document: Document, longest: int) -> Iterator[Record]:
    """Plain text. A line's end (\\n or \\r\\n) belongs to it, except after the last line of a paragraph."""
    builder = _Builder(codec, longest)
    number = 0
    is_new_line = True
    for line in lines:
        number += is_new_line
        is_whole_line = is_new_line and line.endswith(b"\n")
        is_new_line = line.endswith(b"\n")
        if document == "file":
            yield from builder.add(line, number)
        elif is_whole_line and not line.strip(b" \t\r\n"):
            yield from builder.finish(without_line_end=True)
        else:
            yield from builder.add(line, number)
            if document == "line" and is_new_line:
                yield from builder.finish(without_line_end=True)
    yield from builder.finish(without_line_end=document != "file")


class _Builder:
    """Gathers one document from pieces of bytes and hands out what exceeds the longest length."""

    def __init__(self, codec: str, longest: int) -> None:
        self._decoder = codecs.getincrementaldecoder(codec)()
        self._codec = codec
        self._longest = longest
        self._clear()

    def _clear(self) -> None:
        self._decoder.reset()
        self._pieces: list[str] = []
        self._characters = 0
        self._line = 0
        self._is_first = True
        self._reason = ""

    def add(self, piece: bytes, line: int) -> Iterator[Record]:
        self._line = self._line or line
        if self._reason:
            return
        try:
            text = self._decoder.decode(piece)
        except UnicodeDecodeError as error:
            self._reason = f"line {line} holds bytes that are not {self._codec} ({error.object[error.start]:#04x})"
            self._pieces = []
            return
        self._pieces.append(text)
        self._characters += len(text)
        if self._characters > self._longest:
            whole = "".join(self._pieces)
            *complete, (rest, _) = cuts(whole, self._longest)
            for begin, stop in complete:
                yield Record(self._line, whole[begin:stop], is_first=self._is_first, is_last=False)
                self._is_first = False
            self._pieces = [whole[rest:]]
            self._characters = len(whole) - rest

    def finish(self, without_line_end: bool) -> Iterator[Record]:
        if self._line:
            if not self._reason and self._decoder.getstate()[0]:
                self._reason = f"its last character is cut short ({self._codec})"
            if self._reason:
                yield Record(self._line, None, self._reason)
            else:
                text = "".join(self._pieces)
                if without_line_end and text.endswith("\n"):
                    text = text[: -2 if text.endswith("\r\n") else -1]
                yield Record(self._line, text, is_first=self._is_first)
        self._clear()
