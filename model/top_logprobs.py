"""The likeliest tokens at every place of a given text, beside the one that stands there: one forward pass.

    log p(. | ids before) = log_softmax(logits), at temperature 1 and before any filter

Logits are formed chunk by chunk, as everywhere, and only their largest are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kernels.vocabulary import HeadProducts, chunks
from model.batch import Layout
from model.errors import InputError
from model.heads import CausalLM


class TokenLogprob(NamedTuple):
    """Of one token, given all before it.

    logprob: the token's own.
    top: (id, log-probability) of the likeliest tokens there, falling; the token is among them only if it is one.
    """

    logprob: float
    top: list[tuple[int, float]]


@torch.inference_mode()
def top_logprobs(model: CausalLM, ids: Sequence[int], start: int, count: int) -> list[TokenLogprob]:
    """Score `ids[start:]`, each token given all before it.

    Args:
        ids: one text, at most the context.
        start: from 1, as nothing predicts the first token.
        count: how many of the likeliest tokens are named, 0 or more.
    Returns:
        one for each of `ids[start:]`.
    Raises:
        InputError: `start` or `count` is out of range, the text is longer than the context, or it holds ids that the
            model does not know.
    """
    vocabulary, context = model.config.vocab_size, model.config.rope_length
    if not 1 <= start <= len(ids):
        raise InputError(f"start is {start} in a text of {len(ids)} tokens. Give a value from 1 to its length.")
    if not 0 <= count <= vocabulary:
        raise InputError(f"count is {count}. Give a value from 0 to {vocabulary}, the size of the vocabulary.")
    if len(ids) > context:
        raise InputError(f"The text has {len(ids)} tokens, the context is {context}. Cut it.")
    if min(ids) < 0 or max(ids) >= vocabulary:
        raise InputError(f"The text holds ids outside 0 to {vocabulary - 1}. Use the model's own tokenizer.")
    if start == len(ids):
        return []
    weight = model.head_weight
    tokens = torch.tensor(ids, device=weight.device)  # [T]
    length = len(ids) - 1
    bounds = torch.tensor([0, length], dtype=torch.int32, device=weight.device)
    positions = torch.arange(length, device=weight.device)
    hidden = model.model(tokens[:-1], positions, Layout(bounds, bounds, length, length))[start - 1 :]  # [N, d]
    products, targets = HeadProducts(weight), tokens[start:]
    found = []
    for part in chunks(len(hidden), len(weight), hidden.dtype, hidden.device):
        logprobs = torch.log_softmax(products.logits(hidden[part]), dim=1)  # [n, V], fp32
        own = logprobs.gather(1, targets[part, None])[:, 0]
        found.append((own, *logprobs.topk(count, dim=1)))
    return [
        TokenLogprob(logprob, list(zip(places, values, strict=True)))
        for own, top, at in found
        for logprob, values, places in zip(own.tolist(), top.tolist(), at.tolist(), strict=True)
    ]
