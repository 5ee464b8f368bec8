"""Streamed text: its pieces are what decoding the whole gives, and end before a stop text."""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.streaming import TextStream
from model.tokenizer import Tokenizer
from tests.model.tokenizer_bases import write_llama, write_qwen

KINDS = ["llama", "llama without dummy prefix", "qwen"]
TEXT = "血压偏高的病人，𠮷一日三次😀。 A fever, 38.5 degrees  \n"
BROKEN = "\ufffd"


@cache
def tokenizer(kind: str) -> Tokenizer:
    directory = Path(mkdtemp()) / "base"
    if kind == "qwen":
        return Tokenizer.load(write_qwen(directory))
    return Tokenizer.load(write_llama(directory, add_dummy_prefix=kind == "llama"))


def streamed(kind: str, ids: list[int], stop_texts: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    stream = TextStream(tokenizer(kind), stop_texts)
    pieces = [*(stream.push(token) for token in ids), stream.finish()]
    assert stream.is_stopped == (stream.stopped_by is not None)
    return pieces, stream.stopped_by


@cache
def single_bytes(kind: str) -> dict[int, int]:
    """byte -> the id that stands for it alone."""
    if kind == "qwen":
        pairs = ((tokenizer(kind).token_bytes(index), index) for index in range(tokenizer(kind).vocab_size))
        return {content[0]: index for content, index in pairs if len(content) == 1}
    return {byte: tokenizer(kind).split(f"<0x{byte:02X}>")[0] for byte in range(256)}


@st.composite
def sequences(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Any ids: whole texts, their characters in bytes, loose bytes, special and added tokens, holes past the end."""
    kind = draw(st.sampled_from(KINDS))
    base = tokenizer(kind)
    byte = single_bytes(kind)
    characters = st.sampled_from([*TEXT, " ", "é", BROKEN])
    part = st.one_of(
        st.text(characters, max_size=4).map(base.encode),
        st.text(characters, max_size=2).map(lambda text: [byte[value] for value in text.encode()]),
        st.lists(st.integers(0, 255), max_size=2).map(lambda values: [byte[value] for value in values]),
        st.lists(st.sampled_from(sorted(base.added_tokens)), max_size=2),
        st.lists(st.integers(0, base.vocab_size + 3), max_size=3),
    )
    return kind, sum(draw(st.lists(part, max_size=5)), [])


@settings(max_examples=600, derandomize=True, deadline=None)
@given(sequences())
def test_pieces_together_are_the_decoded_text(sequence: tuple[str, list[int]]) -> None:
    kind, ids = sequence
    assert "".join(streamed(kind, ids)[0]) == tokenizer(kind).decode(ids, skip_special=True)
