"""Texts to tokens for scores that compare words: Chinese has none between spaces, so its characters are the words.

    "服用0.5mg阿司匹林，每日２次。"  ->  服 用 0.5 mg 阿 司 匹 林 , 每 日 2 次 。

The text is brought to NFKC, so full-width letters, digits and commas are what their narrow ones are. Then words of
alphabetic scripts and numbers stay whole (a number ends where a letter begins: "0.5mg" and "0.5 mg" are the same), and
everything else that is no space is a token by itself: Chinese characters, kana, hangul, and punctuation, which counts.
Case counts too. Which spaces a text has, and where, does not matter but between two words or two numbers.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Protocol

from model.errors import InputError

# Letters of Latin, Greek and Cyrillic, with the marks that combine with them. A number holds points but no commas: NFKC
# makes the full-width comma of "120，80" a narrow one. Of the invisible characters, those that texts from the web hold.
_TOKEN = re.compile(
    r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u052f\u1e00-\u1fff]+"
    r"|[0-9]+(?:\.[0-9]+)*"
    r"|[^\s\u00ad\u200b-\u200f\u2060-\u2064\ufe00-\ufe0f\ufeff]"
)


class Tokenizer(Protocol):
    """signature: what a score must name, such as char or jieba-0.42.1."""

    signature: str

    def tokenize(self, text: str) -> list[str]:
        """Tokens, none of which is empty or holds a space."""
        ...


class CharacterTokenizer:
    """Characters, words of alphabetic scripts, and numbers."""

    signature = "char"

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(unicodedata.normalize("NFKC", text))


class JiebaTokenizer:
    """The words that jieba finds in the NFKC of a text, to compare with scores that were computed on them."""

    def __init__(self) -> None:
        """
        Raises:
            InputError: jieba is not installed.
        """
        try:
            import jieba
        except ImportError:
            raise InputError("tok=jieba needs jieba. pip install jieba, or leave it out to score characters.") from None
        jieba.setLogLevel("WARNING")
        self._cut = jieba.lcut
        self.signature = f"jieba-{jieba.__version__}"

    def tokenize(self, text: str) -> list[str]:
        return [part for word in self._cut(unicodedata.normalize("NFKC", text)) for part in word.split()]


def tokenizer_of(name: str) -> Tokenizer:
    """name: "char" or "jieba"."""
    return JiebaTokenizer() if name == "jieba" else CharacterTokenizer()
