"""One packed document as the model will see it: decoded, with the trained tokens told from the others."""

from __future__ import annotations

import sys

from model.batch import IGNORE, PackedBatch
from model.tokenizer import Tokenizer

_BOLD, _DIM, _RESET = "\033[1m", "\033[2m", "\033[0m"


def show_document(batch: PackedBatch, tokenizer: Tokenizer, index: int = 0, most_tokens: int = 200) -> str:
    """A document of a pack as text: trained tokens bold on a terminal, between ⟦ and ⟧ elsewhere.

    Args:
        index: which of the pack's documents.
        most_tokens: longer ones are cut, and say so.
    """
    begin, end = batch.cu_seqlens[index : index + 2].tolist()
    shown = min(end, begin + most_tokens)
    # A token is trained where the token before it has it as its target.
    trained = [False, *(batch.targets[begin : shown - 1] != IGNORE).tolist()]
    parts: list[str] = []
    start = 0
    for position in range(1, len(trained) + 1):
        if position == len(trained) or trained[position] != trained[start]:
            ids = batch.tokens[begin + start : begin + position].tolist()
            parts.append(_mark(_decode(ids, tokenizer), trained[start]))
            start = position
    rest = f" … and {end - shown} tokens more" if shown < end else ""
    return "".join(parts) + rest


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


def _mark(text: str, is_trained: bool) -> str:
    if sys.stdout.isatty():
        return f"{_BOLD if is_trained else _DIM}{text}{_RESET}"
    return f"⟦{text}⟧" if is_trained else text
