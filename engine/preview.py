"""A document as the model will see it: decoded, with the trained tokens told from the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from model.batch import IGNORE, PackedBatch
from model.tokenizer import Tokenizer

_BOLD, _DIM, _RESET = "\033[1m", "\033[2m", "\033[0m"


def show_document(
    batch: PackedBatch, tokenizer: Tokenizer, index: int = 0, most_tokens: int = 200, stream: TextIO | None = None
) -> str:
    """A document of a pack as text: trained tokens bold on a terminal, between ⟦ and ⟧ elsewhere.

    Args:
        index: which of the pack's documents.
        most_tokens: longer ones lose their middle, and say so; how the last answer ends is always seen.
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
    """Tokens as text: trained ones bold on a terminal, between ⟦ and ⟧ elsewhere."""
    is_terminal = (stream or sys.stdout).isatty()

    def part(start: int, end: int) -> str:
        text = ""
        for position in range(start + 1, end + 1):
            if position == end or trained[position] != trained[start]:
                text += _mark(_decode(list(ids[start:position]), tokenizer), trained[start], is_terminal)
                start = position
        return text

    if len(ids) <= most_tokens:
        return part(0, len(ids))
    head = most_tokens // 2
    tail = len(ids) - (most_tokens - head)
    return f"{part(0, head)} … {tail - head} tokens more … {part(tail, len(ids))}"


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
