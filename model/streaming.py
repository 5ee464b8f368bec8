"""The text of an answer while it is being generated: whole characters only, and nothing of a stop text.

Two decoders serve all bases, told apart by the `decoder` of tokenizer.json:

    byte-level (Llama 3, Qwen)          every piece stands for bytes; the text is their UTF-8
    byte fallback (LLaMA, Mistral, Yi)  pieces are text, but <0xE4> is a byte; runs of these are decoded as a whole

Either way what a stream gives, all together, is `Tokenizer.decode(ids, skip_special=True)`, for any ids. Bytes that
are no UTF-8 become U+FFFD: in byte-level text one for each broken character, in a run of byte pieces one for each
byte of the run, should any of it be broken. So such a run is held back until another piece ends it.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from model.errors import InputError
from model.tokenizer import Tokenizer, byte_level_alphabet

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """Text from tokens, one by one, in constant time each.

    stopped_by: the stop text that ended the stream, None so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()) -> None:
        """
        Raises:
            InputError: the tokenizer turns pieces into text in a way that is not known here.
        """
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._decoder = _decoder(tokenizer)
        self._stop_texts = tuple(stop_texts)
        self._held = ""  # what may be the beginning of a stop text

    @property
    def is_stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token: int) -> str:
        """The text that this token makes certain; "" once a stop text has come."""
        added = self._tokenizer.added_tokens.get(token)
        is_text = added is None or not added.special
        return self._release(self._decoder.push(self._tokenizer.piece(token)) if is_text else "")

    def finish(self) -> str:
        """The rest: broken characters as U+FFFD, and what looked like a stop text but was none."""
        text = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.is_stopped or not self._stop_texts:
            return "" if self.is_stopped else text
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stop_texts if (at := text.find(stop)) >= 0]
        if found:
            # The one that is complete first, whatever the tokens were.
            _, end, self.stopped_by = min(found)
            self._held = ""
            return text[:end]
        held = max(_overlap(text, stop) for stop in self._stop_texts)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that a stop text begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class _ByteLevel:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> str:
        alphabet = _alphabet()
        try:
            return self._utf8.decode(bytes([alphabet[character] for character in piece]))
        except KeyError:  # an added token, written as it is
            return self._utf8.decode(piece.encode())

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _ByteFallback:
    """replacements: old -> new in every piece. prefix, times: what is taken off the text's beginning, how often."""

    def __init__(self, replacements: Sequence[tuple[str, str]], prefix: str, times: int) -> None:
        self._replacements = replacements
        self._prefix, self._times = prefix, times
        self._run = bytearray()

    def push(self, piece: str) -> str:
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        if not piece:
            return ""
        if byte := _BYTE.fullmatch(piece):
            self._run.append(int(byte[1], 16))
            return ""
        return self._strip(self._end_run() + piece)

    def finish(self) -> str:
        return self._strip(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip(self, text: str) -> str:
        while self._times and text:
            if not text.startswith(self._prefix):
                self._times = 0
                break
            text = text[len(self._prefix) :]
            self._times -= 1
        return text


@cache
def _alphabet() -> dict[str, int]:
    return byte_level_alphabet()


def _decoder(tokenizer: Tokenizer) -> _ByteLevel | _ByteFallback:
    rule = tokenizer.decoder
    steps: list[dict[str, Any]] = rule.get("decoders", [rule])
    kinds = " ".join(str(step.get("type")) for step in steps)
    if kinds == "ByteLevel":
        return _ByteLevel()
    replacements = [(step["pattern"].get("String"), step["content"]) for step in steps if step.get("type") == "Replace"]
    strip: dict[str, Any] = steps[-1] if kinds.endswith(" Strip") else {"content": "", "start": 0, "stop": 0}
    is_known = re.fullmatch("(Replace )*ByteFallback Fuse( Strip)?", kinds) and strip["stop"] == 0
    if not is_known or any(old is None for old, _ in replacements):
        known = "ByteLevel, or Replace, ByteFallback, Fuse and Strip"
        raise InputError(f"tokenizer.json: text cannot be streamed with the decoder {rule}; it must be {known}.")
    return _ByteFallback(replacements, strip["content"], strip["start"])
