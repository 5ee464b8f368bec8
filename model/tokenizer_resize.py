"""Give a model the rows of an extended vocabulary, one tensor at a time.

A new piece starts as the mean of the old pieces that used to spell it, in the embedding and in the head. Rows that
only pad the vocabulary to a multiple of 64 get the mean of all real rows: as exp is convex, the probability of a
padding id is then never above the average id's, whereas a zero row may be far above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from model.directories import lineage
from model.errors import InputError
from model.hf import load_config, read_model, write_model
from model.tokenizer import Tokenizer
from model.tokenizer_extension import extended_rows

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")


def resize_model(model: str | Path, old: Tokenizer, new: Tokenizer, directory: str | Path) -> int:
    """Write to `directory` the model with rows for `new`, and `new` beside it; weights keep their dtype.

    Args:
        model: a model directory trained with `old`; of an adapter's the merged model is written, in its base's dtype.
        old, new: tokenizers; `new` holds every id of `old`.
    Returns:
        the rows of the new vocabulary: a multiple of 64, and never fewer than before.
    Raises:
        InputError: the model has fewer rows than `old` has ids, or `new` does not extend `old`.
    """
    read_from = list(lineage(model))
    if Path(directory).resolve() in map(Path.resolve, read_from):
        raise InputError(
            f"{directory}: the resized model cannot replace the one it is read from. Choose another --out."
        )
    config = load_config(model, "lm")
    if config.vocab_size < old.vocab_size:
        raise InputError(
            f"{model}: the model has {config.vocab_size} rows, its tokenizer {old.vocab_size} ids. "
            "Give the tokenizer that the model was trained with."
        )
    rows = extended_rows(old, new)
    num_rows = max(new.padded_vocab_size, config.vocab_size)
    tensors = read_model(model, config)
    first_name, first = next(tensors)
    _, stored = next(read_model(read_from[-1], load_config(read_from[-1])))

    def resized() -> Iterator[tuple[str, Tensor]]:
        yield first_name, extend_rows(first, rows, old.vocab_size, num_rows)
        for name, tensor in tensors:
            is_resized = name in VOCABULARY_TENSORS
            yield name, extend_rows(tensor, rows, old.vocab_size, num_rows) if is_resized else tensor

    assert first_name in VOCABULARY_TENSORS
    write_model(directory, config.with_vocab_size(num_rows), resized(), stored.dtype)
    new.save(directory)
    return num_rows


def extend_rows(weight: Tensor, rows: dict[int, list[int]], old_size: int, num_rows: int) -> Tensor:
    """A vocabulary's matrix with new rows.

    Args:
        weight: [V_old, d], of which the first `old_size` rows belong to real ids.
        rows: new id -> old ids whose mean it becomes (all, where there are none); the new ids follow `old_size`.
        num_rows: V_new; the rows past the last new id become the mean of the real rows.
    Returns:
        [V_new, d], dtype of weight; means are taken in fp32.
    """
    new_size = old_size + len(rows)
    assert sorted(rows) == list(range(old_size, new_size)) and new_size <= num_rows
    extended = weight.new_empty(num_rows, weight.shape[1])
    extended[:old_size] = weight[:old_size]
    mean = weight[:old_size].mean(0, dtype=torch.float32)
    for new_id, old_ids in rows.items():
        extended[new_id] = weight[old_ids].float().mean(0) if old_ids else mean
    extended[new_size:] = mean
    return extended
