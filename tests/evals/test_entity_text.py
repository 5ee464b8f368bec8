"""Where a text holds a mention, whichever way both are written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from evals.entity_text import FoldedText, fold


@given(st.text(max_size=12), st.text(max_size=12))
def test_folding_goes_character_by_character_and_is_done_once(a: str, b: str) -> None:
    assert fold(a + b) == fold(a) + fold(b)
    assert not any(character.isspace() for character in fold(a))


@given(st.text("aＡ甲 ㎎m1½", min_size=1, max_size=8), st.data())
def test_every_piece_of_a_text_is_found_where_it_is(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    piece = text[start:end]
    if fold(piece):
        trimmed = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
        assert trimmed in FoldedText(text).find(fold(piece))


@given(st.text("aＡ甲 ㎎m1½g", max_size=8), st.text("a甲mg1", min_size=1, max_size=3))
def test_what_is_found_reads_like_what_was_looked_for(text: str, mention: str) -> None:
    for start, end in FoldedText(text).find(fold(mention)):
        assert fold(text[start:end]) == fold(mention)
        assert not text[start].isspace() and not text[end - 1].isspace()


def test_places_are_counted_in_the_text_itself() -> None:
    text = FoldedText("体温 ３８．５℃，予 Ｖ Ｃ 2㎎")
    assert text.find(fold("38.5℃")) == [(3, 8)]
    assert text.find(fold("vc")) == [(11, 14)]
    assert text.find(fold("2mg")) == [(15, 17)]


def test_half_a_character_is_no_place() -> None:
    assert FoldedText("2㎎").find("m") == [] and "m" in FoldedText("2㎎")


def test_places_may_overlap() -> None:
    assert FoldedText("哈哈哈").find("哈哈") == [(0, 2), (1, 3)]
