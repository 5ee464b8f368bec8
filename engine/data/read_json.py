"""JSON to records: one value a line, or one list that may be larger than memory."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from engine.data.encodings import SAMPLE_BYTES, Stream
from engine.data.read_text import read_lines
from engine.data.records import LONGEST_RECORD, Record, Schema, to_record
from model.errors import InputError


def json_lines(stream: Stream, start: int, end: int | None, schema: Schema) -> Iterator[Record]:
    pieces: list[bytes] = []
    size = 0
    number = 1
    for piece in itertools.chain(read_lines(stream, start, end), [b""]):
        size += len(piece)
        if size <= LONGEST_RECORD:
            pieces.append(piece)
        if piece and not piece.endswith(b"\n"):
            continue
        if size > LONGEST_RECORD:
            yield Record(number, None, f"a line of {size >> 20} MiB; records end at {LONGEST_RECORD >> 20} MiB")
        elif line := b"".join(pieces).strip(b" \t\r\n"):
            yield _json_line(number, line, stream.codec, schema)
        pieces.clear()
        size = 0
        number += 1


def _json_line(number: int, line: bytes, codec: str, schema: Schema) -> Record:
    try:
        return to_record(number, json.loads(line.decode(codec)), schema)
    except UnicodeDecodeError as error:
        return Record(number, None, f"byte {error.start} of the line is not {codec} ({line[error.start]:#04x})")
    except RecursionError:
        return Record(number, None, "broken JSON: nested too deeply")
    except json.JSONDecodeError as error:
        return Record(number, None, f"broken JSON: {error.msg} at character {error.pos + 1}")
    except ValueError:  # Python's own limit, against quadratic time
        return Record(number, None, f"broken JSON: {_TOO_MANY_DIGITS}")


_TOO_MANY_DIGITS = "a number of thousands of digits"
_DELIMITERS = (" ", "\t", "\r", "\n", ",", "]")
_ENOUGH_FOLLOWING = 16
_SPACES = re.compile(r"[ \t\r\n]*")


class _JsonText:
    """A window on a JSON text that moves forward; values are taken from its front."""

    def __init__(self, stream: Stream, path: str) -> None:
        self._stream = stream
        self._path = path
        self._decoder = codecs.getincrementaldecoder(stream.codec)()
        self._scan = json.JSONDecoder().raw_decode
        self._window = ""
        self._position = 0
        self._bytes = 0
        self._is_end = False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            self._advance(_SPACES.match(self._window, self._position).end())  # type: ignore[union-attr]
            if self._position < len(self._window):
                return self._window[self._position]
            if self._is_end:
                return ""
            self._fill(SAMPLE_BYTES)

    def skip(self) -> None:
        """Pass the character that `peek` showed."""
        self._advance(self._position + 1)

    def value(self) -> Any:
        """The JSON value that begins here, with what follows it in the window."""
        while True:
            try:
                value, stop = self._scan(self._window, self._position)
            except RecursionError:
                raise self.error("nested too deeply") from None
            except json.JSONDecodeError as error:
                if self._is_end:
                    raise self.error(error.msg) from None
            except ValueError:
                raise self.error(_TOO_MANY_DIGITS) from None
            else:
                # A number may go on behind the window ("1.5" of "1.5e3"): what follows shows whether it is whole.
                following = self._window[stop : stop + _ENOUGH_FOLLOWING]
                if self._is_end or following[:1] in _DELIMITERS or len(following) == _ENOUGH_FOLLOWING:
                    self._advance(stop)
                    return value
            waiting = len(self._window) - self._position
            if waiting > LONGEST_RECORD:
                raise self.error(f"no value ends within {LONGEST_RECORD >> 20} Mi characters")
            self._fill(max(SAMPLE_BYTES, waiting))  # doubling keeps a long value's cost linear

    def error(self, problem: str) -> InputError:
        return InputError(f"{self._path}:{self.line}: broken JSON list: {problem}. Mend or remove the file.")

    def _advance(self, position: int) -> None:
        self.line += self._window.count("\n", self._position, position)
        self._position = position

    def _fill(self, size: int) -> None:
        chunk = self._stream.read(size)
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = self._bytes - pending + error.start
            raise InputError(
                f"{self._path}: byte {offset} is not {self._stream.codec}. Mend or remove the file."
            ) from None
        self._bytes += len(chunk)
        self._is_end = not chunk
        self._window = self._window[self._position :] + text
        self._position = 0


def json_list(stream: Stream, path: str, schema: Schema) -> Iterator[Record]:
    text = _JsonText(stream, path)
    if text.peek() != "[":
        raise text.error("it does not begin with [")
    text.skip()
    if text.peek() == "]":
        text.skip()
    else:
        while True:
            text.peek()
            line = text.line
            yield to_record(line, text.value(), schema)
            separator = text.peek()
            text.skip()
            if separator == "]":
                break
            if separator != ",":
                raise text.error("the list has no end" if not separator else f"{separator!r} where a comma belongs")
    if text.peek():
        raise text.error("something follows the list's end")
