"""Tokenizers that cost nothing and documents of known lengths, for tests of everything around them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from engine.data.prepare import prepare
from engine.data.sources import ReadOptions


class Bytes:
    """One id a byte of UTF-8."""

    vocab_size = 258
    bos_id = 256
    eos_id = 257
    add_bos = True
    fingerprint = "bytes"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def save(self, directory: Path) -> None:
        directory.mkdir()


def prepare_lengths(directory: Path, lengths: Sequence[int], first: int = 0) -> Path:
    """A prepared directory whose documents have these many tokens, each text unlike all others.

    Args:
        first: number of the first document; its ids are digits of its number, over and over.
    """
    directory.mkdir()
    lines = (json.dumps(_text(first + number, length - 2)) + "\n" for number, length in enumerate(lengths))
    (directory / "raw.jsonl").write_text("".join(lines))
    options = ReadOptions(min_characters=1)
    return prepare([directory / "raw.jsonl"], Numbers(), directory / "prepared", options, workers=1)


def _text(number: int, length: int) -> str:
    """Four characters tell any two documents apart, fewer only those of a small corpus."""
    digits = [number % 250, number // 250 % 250, number // 62_500 % 250, length % 250]
    return "".join(chr(0x4E00 + digits[position % 4]) for position in range(length))


class Numbers(Bytes):
    """One id a character."""

    fingerprint = "numbers"

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[ord(character) - 0x4E00 for character in text] for text in texts]
