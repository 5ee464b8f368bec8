"""Texts become tokens: characters, whole words and numbers, and punctuation."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.characters import CharacterTokenizer, tokenizer_of
from model.errors import InputError

tokenize = CharacterTokenizer().tokenize


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("头孢，不要饮酒。", "头 孢 , 不 要 饮 酒 。"),
        ("服0.5mg阿司匹林", "服 0.5 mg 阿 司 匹 林"),
        ("每日２次，每次０．５ｍｇ", "每 日 2 次 , 每 次 0.5 mg"),
        ("血压120，80", "血 压 120 , 80"),
        ("1,000 ml", "1 , 000 ml"),
        ("CA19-9升高", "CA 19 - 9 升 高"),
        ("Ⅱ型，37.5℃…", "II 型 , 37.5 ° C . . ."),
        ("β受体 α-干扰素 Ménière病", "β 受 体 α - 干 扰 素 Ménière 病"),
        ("“头晕”、（呕吐）！", "“ 头 晕 ” 、 ( 呕 吐 ) !"),
        ("一一二", "一 一 二"),
        ("共3.5.2节。", "共 3.5.2 节 。"),
        ("かゆみ 통증", "か ゆ み 통 증"),
        ("头\u200b晕\ufeff\u3000\n\t", "头 晕"),
        ("\U00020000", "\U00020000"),
        ("", ""),
        (" \u3000\n", ""),
    ],
)
def test_texts_are_taken_apart_as_a_reader_would(text: str, tokens: str) -> None:
    assert tokenize(text) == tokens.split()


@given(st.text(), st.text())
def test_no_token_is_empty_or_holds_a_space(text: str, more: str) -> None:
    tokens = tokenize(text + more)
    assert " ".join(tokens).split() == tokens


@given(st.lists(st.sampled_from(["头", "晕", "，", "0.5", "mg", "。", "！"]), max_size=20))
def test_spaces_around_characters_punctuation_and_units_do_not_matter(pieces: list[str]) -> None:
    kept = [piece for piece, before in zip(pieces, ["", *pieces], strict=False) if piece != before]
    assert tokenize("".join(kept)) == tokenize(" ".join(kept)) == tokenize("\u3000".join(kept))


def test_words_of_jieba_without_jieba_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(InputError, match="tok=jieba needs jieba"):
        tokenizer_of("jieba")


def test_words_of_jieba_are_cut_from_the_normalised_text_and_hold_no_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(text: str) -> list[str]:
        assert text == "头孢 ab"
        return ["头孢", " ", "ab"]

    monkeypatch.setitem(
        sys.modules, "jieba", SimpleNamespace(lcut=cut, setLogLevel=lambda level: None, __version__="0.42.1")
    )
    tokenizer = tokenizer_of("jieba")
    assert (tokenizer.tokenize("头孢\u3000ａｂ"), tokenizer.signature) == (["头孢", "ab"], "jieba-0.42.1")
