"""What a tokenizer does to a text: how many tokens it takes, and whether it comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from model.tokenizer import Tokenizer
from model.tokenizer_sentencepiece import SPACE

_BATCH_CHARACTERS = 1_000_000


@dataclass
class TokenizerReport:
    """Counts over some documents; characters are Unicode code points.

    lossy_documents: those in which a literal U+2581 came back as a space, and nothing else changed.
    changed_documents: those that came back otherwise than they went in.
    """

    documents: int = 0
    characters: int = 0
    tokens: int = 0
    lossy_documents: int = 0
    changed_documents: int = 0

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(self.tokens, 1)


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenizerReport:
    """Encode and decode every text; memory is bounded by the longest of them."""
    report = TokenizerReport()
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            report.documents += 1
            report.characters += len(text)
            report.tokens += len(ids)
            decoded = tokenizer.decode(ids)
            if decoded != text:
                is_lossy = SPACE in text and decoded == text.replace(SPACE, " ")
                report.lossy_documents += is_lossy
                report.changed_documents += not is_lossy
    return report


class HeldOutLines:
    """Passes texts through without every `every`-th line, and keeps those lines to measure on.

    lines: the held-out lines, filled while the texts are read; once they hold `max_characters`, no more are taken.
    """

    def __init__(self, texts: Iterable[str], every: int = 50, max_characters: int = 1_000_000) -> None:
        self._texts = texts
        self._every = every
        self._room = max_characters
        self.lines: list[str] = []

    def __iter__(self) -> Iterator[str]:
        number = 0
        for text in self._texts:
            kept = []
            for line in text.splitlines(keepends=True):
                number += bool(line.strip())
                if line.strip() and number % self._every == 0 and len(line) <= self._room:
                    self.lines.append(line)
                    self._room -= len(line)
                else:
                    kept.append(line)
            yield "".join(kept)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= _BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
