"""A document as the model will see it: decoded, with the trained tokens told from the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

from model.batch import IGNORE, PackedBatch
from model.tokenizer import Tokenizer

_BOLD, _DIM, _RESET = "\033[1m", "\033[2m", "\033[0m"
_LEAST_TOKENS = 16  # of a stretch between two borders, where there is not room for all of it
_HALF = "\ufffd"  # what a part of a character decodes to
_CHARACTER_TOKENS = 4  # at most, where a token is a byte


def show_document(
    batch: PackedBatch, tokenizer: Tokenizer, index: int = 0, most_tokens: int = 200, stream: TextIO | None = None
) -> str:
    """A document of a pack as text: trained tokens bold on a terminal, between ⟦ and ⟧ elsewhere.

    Args:
        index: which of the pack's documents.
        most_tokens: longer ones lose the middles of their parts, and say so; how the last answer ends is always seen.
        stream: where the text will be printed; by default stdout.
    """
    begin, end = batch.cu_seqlens[index : index + 2].tolist()
    # A token is trained where the token before it has it as its target.
    trained = [False, *(batch.targets[begin : end - 1] != IGNORE).tolist()]
    return show_ids(batch.tokens[begin:end].tolist(), trained, tokenizer, most_tokens, stream)


def show_ids(
    ids: Sequence[int],
    trained: Sequence[bool],
    tokenizer: Tokenizer,
    most_tokens: int = 200,
    stream: TextIO | None = None,
) -> str:
    """Tokens as text: trained ones bold on a terminal, between ⟦ and ⟧ elsewhere.

    Long stretches of the one or the other lose their middle, so that every border is seen; where there are too many
    stretches, those in the middle are left out.
    """
    is_terminal = (stream or sys.stdout).isatty()
    borders = [at for at in range(1, len(ids)) if trained[at] != trained[at - 1]]
    stretches = list(pairwise([0, *borders, len(ids)])) if len(ids) else []
    text = []
    most_stretches = max(2, most_tokens // _LEAST_TOKENS)
    if len(ids) > most_tokens and len(stretches) > most_stretches:  # as many from the beginning as from the end
        first, last = stretches[: most_stretches // 2], stretches[-(most_stretches // 2) :]
        left_out = last[0][0] - first[-1][1]
    else:
        first, last, left_out = stretches, [], 0
    shares = _shares([end - start for start, end in (*first, *last)], most_tokens)
    for number, ((start, end), share) in enumerate(zip((*first, *last), shares, strict=True)):
        if left_out and number == len(first):
            text.append(f" … {left_out} tokens more … ")
        shown = _shorten(list(ids[start:end]), share, tokenizer)
        text.append(_mark(shown, trained[start], is_terminal))
    return "".join(text)


def _shares(lengths: Sequence[int], most: int) -> list[int]:
    """How many tokens of each stretch are shown, of `most` in all: short ones whole, long ones alike."""
    shares = [0] * len(lengths)
    for rank, index in enumerate(sorted(range(len(lengths)), key=lambda index: lengths[index])):
        shares[index] = min(lengths[index], max(_LEAST_TOKENS // 2, most // (len(lengths) - rank)))
        most -= shares[index]
    return shares


def _shorten(ids: list[int], most: int, tokenizer: Tokenizer) -> str:
    """Text without its middle, which is left out between whole characters."""
    if len(ids) <= most:
        return _decode(ids, tokenizer)
    head, tail = most // 2, len(ids) - (most - most // 2)
    for _ in range(_CHARACTER_TOKENS):
        head -= head > 0 and _decode(ids[:head], tokenizer).endswith(_HALF)
        tail += tail < len(ids) and _decode(ids[tail:], tokenizer).startswith(_HALF)
    return f"{_decode(ids[:head], tokenizer)} … {tail - head} tokens more … {_decode(ids[tail:], tokenizer)}"


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    """Text with special tokens by name, which decoding alone would drop."""
    special = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    text = ""
    run: list[int] = []
    for token in ids:
        if token in special:
            text, run = text + tokenizer.decode(run) + special[token], []
        else:
            run.append(token)
    return text + tokenizer.decode(run)


def _mark(text: str, is_trained: bool, is_terminal: bool) -> str:
    if is_terminal:
        return f"{_BOLD if is_trained else _DIM}{text}{_RESET}"
    return f"⟦{text}⟧" if is_trained else text
