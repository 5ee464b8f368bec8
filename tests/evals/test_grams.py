"""Letters and grams: what counts when texts are compared, and that equal grams have equal numbers."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.grams import BORDER, gram_numbers, letters_of

ANY = st.characters(exclude_characters=BORDER, exclude_categories=["Cs", "Cn", "Co"])


def letters(text: str) -> str:
    return "".join(map(chr, letters_of(text).letters))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("１２ｍｇ／ｋｇ，（Ａ）", "12mgkga"),
        ("高血压，\n 患者 ：头晕。", "高血压患者头晕"),
        ("㎎ ℃ ½ Ⅳ ① ﬁ", "mgc12iv1fi"),
        ("ＢＭＩ＝２４．５％", "bmi245"),
        ("e\u0301 가 ❤\ufe0f", "\u00e9가"),
        ("\u1100\u1161\u11a8", "각"),
        ("慢阻肺\ufa0e𠀀", "慢阻肺\ufa0e𠀀"),
        ("", ""),
    ],
)
def test_width_case_spaces_and_punctuation_do_not_count(text: str, expected: str) -> None:
    assert letters(text) == expected


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.text(ANY | st.sampled_from("ｶﾞﾡℌßǅ㍿㎎e\u0301\u1100\u1161\u0b3e\u0b47")))
def test_letters_are_those_of_the_whole_text_in_nfkc(text: str) -> None:
    normal = unicodedata.normalize("NFKC", text).casefold()
    names = {character: unicodedata.name(character, "") for character in normal}
    kept = [c for c in normal if unicodedata.category(c)[0] in "LMN" and not names[c].startswith("VARIATION SELECTOR")]
    assert letters(text) == "".join(kept)


def test_places_point_at_the_letters() -> None:
    found = letters_of("头 晕，\n１天")
    assert [chr(found.points[place]) for place in found.places] == list("头晕１天")
    assert chr(found.points[4]) == "\n"


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13, 21])
def test_grams_have_one_number_if_and_only_if_they_are_equal(n: int) -> None:
    text = np.random.default_rng(0).integers(0x4E00, 0x4E03, 500).astype(np.uint32)  # three letters: many repeats
    numbers = gram_numbers(text, n)
    grams = [tuple(text[at : at + n]) for at in range(len(text) - n + 1)]
    assert len(numbers) == len(grams)
    assert len(set(zip(numbers.tolist(), grams, strict=True))) == len(set(grams)) == len(set(numbers.tolist()))
    assert len(gram_numbers(text[: n - 1], n)) == 0
