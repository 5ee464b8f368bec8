"""Streamed text: its pieces are what decoding the whole gives, and end before a stop text."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from model.streaming import TextStream
from model.tokenizer import Tokenizer, byte_level_alphabet
from tests.model.tokenizer_bases import write_llama, write_qwen

KINDS = ["llama", "llama without dummy prefix", "qwen"]
TEXT = "血压偏高的病人，𠮷一日三次😀。 A fever, 38.5 degrees  \n"
BROKEN = "\ufffd"
FALLBACK = [{"type": "ByteFallback"}, {"type": "Fuse"}]


@cache
def tokenizer(kind: str) -> Tokenizer:
    directory = Path(mkdtemp()) / "base"
    if kind == "qwen":
        table = json.loads((write_qwen(directory) / "tokenizer.json").read_text())
        # Outside the byte-level alphabet, and inside it, where decoding takes it for bytes.
        for index, content in enumerate(("【思】", "°é"), start=table["added_tokens"][-1]["id"] + 1):
            table["added_tokens"].append({**table["added_tokens"][-1], "id": index, "content": content})
        (directory / "tokenizer.json").write_text(json.dumps(table))
        return Tokenizer.load(directory)
    return Tokenizer.load(write_llama(directory, add_dummy_prefix=kind == "llama"))


def streamed(kind: str, ids: list[int], stop_texts: Sequence[str] = ()) -> tuple[list[str], str | None]:
    """(what every token gives, and the end; the stop text that was met)"""
    stream = TextStream(tokenizer(kind), stop_texts)
    shown = [*(stream.push(token) for token in ids), stream.finish()]
    assert stream.is_stopped == (stream.stopped_by is not None)
    return shown, stream.stopped_by


@cache
def pieces(kind: str) -> dict[str, int]:
    return {tokenizer(kind).piece(index): index for index in range(tokenizer(kind).vocab_size)}


def byte_ids(kind: str, content: bytes) -> list[int]:
    """The tokens that stand for single bytes."""
    stand_in = {byte: character for character, byte in byte_level_alphabet().items()}
    return [pieces(kind)[stand_in[byte] if kind == "qwen" else f"<0x{byte:02X}>"] for byte in content]


def parts(kind: str) -> st.SearchStrategy[list[int]]:
    """Whole texts, texts in bytes, loose bytes, special and added tokens, any ids, holes past the end."""
    base = tokenizer(kind)
    characters = st.sampled_from([*TEXT, " ", "é", BROKEN])
    return st.one_of(
        st.text(characters, max_size=4).map(base.encode),
        st.text(characters, max_size=2).map(lambda text: byte_ids(kind, text.encode())),
        st.binary(max_size=2).map(lambda content: byte_ids(kind, content)),
        st.lists(st.sampled_from(sorted(base.added_tokens)), max_size=2),
        st.lists(st.integers(0, base.vocab_size + 3), max_size=3),
    )


sequences = st.sampled_from(KINDS).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(parts(kind), max_size=5).map(lambda found: [*chain(*found)]))
)


@settings(max_examples=500, derandomize=True, deadline=None)
@given(sequences)
def test_pieces_together_are_the_decoded_text(sequence: tuple[str, list[int]]) -> None:
    kind, ids = sequence
    assert "".join(streamed(kind, ids)[0]) == tokenizer(kind).decode(ids, skip_special=True)


def up_to_a_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """What a reader sees who gets the text character by character, and the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, derandomize=True, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.text("ab。 ", min_size=1, max_size=4), st.booleans()), max_size=5),
    st.lists(st.text("ab。 ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_nothing_of_a_stop_text_is_given(kind: str, texts: list[tuple[str, bool]], stops: list[str]) -> None:
    ids = [
        token
        for text, in_bytes in texts
        for token in (byte_ids(kind, text.encode()) if in_bytes else tokenizer(kind).encode(text))
    ]
    shown, met = streamed(kind, ids, stops)
    assert ("".join(shown), met) == up_to_a_stop(tokenizer(kind).decode(ids, skip_special=True), stops)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_characters_come_at_once(kind: str) -> None:
    ids = tokenizer(kind).encode("a fever")
    ends = [tokenizer(kind).decode(ids[:count], skip_special=True) for count in range(len(ids) + 1)]
    assert streamed(kind, ids)[0] == [after[len(before) :] for before, after in pairwise(ends)] + [""]


def test_a_byte_level_character_comes_with_its_last_byte() -> None:
    ids = byte_ids("qwen", "吉😀".encode() + b"\xe5\x90") + byte_ids("qwen", b"a\xe5")
    assert streamed("qwen", ids)[0] == ["", "", "吉", "", "", "", "😀", "", "", f"{BROKEN}a", "", BROKEN]


def test_a_run_of_byte_pieces_comes_when_it_has_ended() -> None:
    """One broken byte spoils the whole run, so nothing of it is certain before."""
    a = tokenizer("llama").split("a")
    assert streamed("llama", byte_ids("llama", "吉".encode()) + a)[0] == ["", "", "", "吉a", ""]
    assert streamed("llama", byte_ids("llama", "吉".encode()))[0] == ["", "", "", "吉"]
    assert streamed("llama", byte_ids("llama", "吉".encode() + b"\xff") + a)[0] == [
        "",
        "",
        "",
        "",
        BROKEN * 4 + "a",
        "",
    ]


def test_a_special_token_does_not_end_a_run_of_bytes() -> None:
    for kind in ("llama", "qwen"):
        first, *rest = byte_ids(kind, "吉".encode())
        assert "".join(streamed(kind, [first, tokenizer(kind).eos_id, *rest])[0]) == "吉"


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    ids = [token for character in "a aab abc" for token in tokenizer("qwen").encode(character)]
    shown, met = streamed("qwen", ids, ["abc"])
    assert (shown, met) == (["", "a ", "", "a", "", "ab ", "", "", "", ""], "abc")
    assert streamed("qwen", ids, ["abcd"])[0] == ["", "a ", "", "a", "", "ab ", "", "", "", "abc"]


def test_a_stopped_stream_stays_silent() -> None:
    stream = TextStream(tokenizer("qwen"), ["。"])
    ids = tokenizer("qwen").encode("一日。")
    assert "".join(stream.push(token) for token in ids) == "一日" and stream.stopped_by == "。"
    assert [stream.push(token) for token in ids] == [""] * len(ids) and stream.finish() == ""


def test_what_is_kept_does_not_grow_with_the_answer() -> None:
    stream = TextStream(tokenizer("llama"), ["\n病人："])
    ids = tokenizer("llama").encode("一般来说\n病人，") * 200
    sizes = set()
    for token in ids:
        stream.push(token)
        sizes.add(len(pickle.dumps([stream._held, vars(stream._decoder)])))
    assert max(sizes) - min(sizes) < 40


def test_an_unknown_decoder_is_refused(tmp_path: Path) -> None:
    directory = write_qwen(tmp_path / "base")
    table = json.loads((directory / "tokenizer.json").read_text())
    for decoder in (
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"Regex": "_+"}, "content": " "}, *FALLBACK]},
        {"type": "Sequence", "decoders": [*FALLBACK, {"type": "Strip", "content": " ", "start": 1, "stop": 1}]},
        None,
    ):
        (directory / "tokenizer.json").write_text(json.dumps(table | {"decoder": decoder}))
        with pytest.raises(InputError, match="cannot be streamed"):
            TextStream(Tokenizer.load(directory))
