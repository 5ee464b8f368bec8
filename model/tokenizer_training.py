"""Train a SentencePiece BPE tokenizer on a stream of texts.

Whatever the texts hold comes back exactly: no normaliser, whitespace kept, no dummy prefix, and bytes for
characters that are too rare for a piece. Line breaks and tabs are never inside a piece and are encoded as bytes,
as in LLaMA. The stream is read once; where it is longer than memory should hold, a uniform sample is kept.
"""

from __future__ import annotations

import heapq
import io
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from model.errors import InputError
from model.tokenizer import Tokenizer

# SentencePiece drops a line that holds one of its own marks (tab, U+2585, NUL), and one that is too long. Cutting
# there first loses nothing but the pairs across the cut.
_CUTS = re.compile("[\n\r\t\0\u2581\u2585]+")
_LONGEST = 4096  # characters of a line


@dataclass
class Sample:
    """What training saw. Characters are Unicode code points.

    texts, characters: of the whole stream; used_characters: those kept; long_lines: lines cut at 4096 characters.
    """

    texts: int = 0
    characters: int = 0
    used_characters: int = 0
    long_lines: int = 0


def train_tokenizer(
    texts: Iterable[str],
    directory: str | Path,
    vocab_size: int,
    *,
    character_coverage: float = 0.9999,
    max_characters: int = 20_000_000,
    seed: int = 0,
) -> Sample:
    """Train on `texts` and save a tokenizer directory. The same texts and options give identical bytes.

    Args:
        texts: documents; read once, never held together.
        vocab_size: ids in all: 4 special tokens, 256 bytes, the space, the characters covered, and merges.
        character_coverage: share of the running characters that get a piece of their own; the rest become bytes.
        max_characters: how much of the stream is kept; beyond it, lines are sampled uniformly.
    Raises:
        InputError: no text, or a vocab_size that the text cannot fill or that cannot hold its characters.
    """
    lines, sample = sample_lines(texts, max_characters, seed)
    model = train_sentencepiece(lines, vocab_size, character_coverage)
    Tokenizer.from_sentencepiece(model, {}).save(directory)
    return sample


def train_sentencepiece(
    lines: Sequence[str], vocab_size: int, character_coverage: float = 0.9999, is_limit_soft: bool = False
) -> bytes:
    """The bytes of a model trained on `lines` from `sample_lines`.

    The trainer takes no coverage below 0.98, more than a small vocabulary can give Chinese. So the lines are cut at the
    rare characters, where it would have put its mark for an unknown one, and of what is left it covers all.

    Args:
        character_coverage: above 0, at most 1; the most frequent characters are taken until they are this share.
        is_limit_soft: accept fewer pieces than vocab_size where the text has no more.
    """
    if not any(lines):
        raise InputError("there is no text to train a tokenizer on. Check --data.")
    if not 0.0 < character_coverage <= 1.0:
        raise InputError(f"a character coverage of {character_coverage} is out of range. Choose above 0, at most 1.")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_cut_at_rare_characters(lines, character_coverage)),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=not is_limit_soft,
            character_coverage=1.0,
            required_chars="\u2581",  # a space is written so; without a piece its bytes would come back as this mark
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _LONGEST,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # the same bytes on any machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), vocab_size) from None
    return writer.getvalue()


def coverage_that_fits(lines: Sequence[str], vocab_size: int) -> float:
    """The largest character coverage, at most 0.9999, that leaves half of the vocabulary to longer pieces.

    Args:
        lines: from `sample_lines`.
    """
    ranked = Counter(itertools.chain.from_iterable(lines)).most_common()
    most = max(1, (vocab_size - 261) // 2)  # 261: 256 bytes, the special tokens and the space
    covered = sum(count for _, count in ranked[:most])
    return min(0.9999, covered / max(1, sum(count for _, count in ranked)))


def _cut_at_rare_characters(lines: Sequence[str], coverage: float) -> Sequence[str]:
    counts = Counter(itertools.chain.from_iterable(lines))
    total, covered, rare = counts.total(), 0, []
    for character, count in counts.most_common():
        if covered / total < coverage:
            covered += count
        else:
            rare.append(character)
    if not rare:
        return lines
    cuts = re.compile(f"[{re.escape(''.join(rare))}]+")
    return [part for line in lines for part in cuts.split(line) if part]


def sample_lines(texts: Iterable[str], max_characters: int, seed: int) -> tuple[list[str], Sample]:
    """A uniform sample of the lines of `texts`, in their order, of at most `max_characters` characters.

    Every line draws a key; the lines of smallest keys that fit are kept, so memory is bounded by the sample.
    """
    sample = Sample()
    draw = random.Random(seed).random
    kept: list[tuple[float, int, str]] = []  # a heap whose root has the largest key: (-key, order, line)
    for order, line in enumerate(_lines(texts, sample)):
        heapq.heappush(kept, (-draw(), order, line))
        sample.used_characters += len(line)
        while sample.used_characters > max_characters:
            sample.used_characters -= len(heapq.heappop(kept)[2])
    kept.sort(key=lambda entry: entry[1])
    return [line for _, _, line in kept], sample


def _lines(texts: Iterable[str], sample: Sample) -> Iterator[str]:
    for text in texts:
        sample.texts += 1
        sample.characters += len(text)
        for line in _CUTS.split(text):
            sample.long_lines += len(line) > _LONGEST
            for start in range(0, len(line), _LONGEST):  # none for an empty line
                yield line[start : start + _LONGEST]


def _explain(message: str, vocab_size: int) -> Exception:
    """The trainer's two complaints about sizes, as sentences; anything else stays an unexpected error."""
    if found := re.search(r"value <= (\d+)", message):
        return InputError(f"a vocabulary of {vocab_size} is more than this text supports: ask for at most {found[1]}.")
    if found := re.search(r"(\d+) vs (\d+)", message):
        least = max(int(number) for number in found.groups())
        return InputError(
            f"a vocabulary of {vocab_size} cannot hold the text's characters: take at least {least}, "
            "or a lower character coverage."
        )
    return RuntimeError(message)
