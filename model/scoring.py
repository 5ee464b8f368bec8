"""Log-probabilities of given continuations: many for each prefix, which is computed once.

A forward pass takes prefixes and, behind each, its continuations without their last tokens, in one flat batch. Where
prefixes begin alike, as with the exemplars (E) before the questions of a subject, the first one brings these tokens:

    E E E E A A A A A A A A . A1 A1 A1 . A2 . B B B B B . B1 . B2 B2 . ...

Every continuation is a document of its own, and so is what a prefix adds to those before it. A document's keys are
those of its beginning and then its own, wherever in the batch they lie: a block table with pages of one token says
where, so no key is moved or held twice. Nothing is padded, and only hidden states that predict a wanted token meet the
head, which keeps no logits. What a continuation of one token needs is the last hidden state of its prefix, so the
letters of a multiple choice cost nothing beside the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import attention
from kernels.linear_logprob import linear_logprob
from kernels.vocabulary import HeadProducts, chunks
from model.batch import Layout
from model.config import ModelConfig
from model.errors import InputError
from model.heads import CausalLM
from model.shared_prefixes import Packed, pack, plan_passes

# Tokens of a forward pass: enough to use a device fully.
TOKEN_BUDGET = 8192
# Entries of a block table, 4 bytes each: many short continuations of a long prefix would make a large one.
TABLE_ENTRIES = 1 << 24


class Score(NamedTuple):
    """Of one continuation.

    logprobs: of its tokens, each given all before it.
    is_greedy: whether each token is the likeliest (the first of them, in a tie); None unless asked for.
    """

    logprobs: list[float]
    is_greedy: bool | None


@torch.inference_mode()
def score(
    model: CausalLM,
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    *,
    token_budget: int = TOKEN_BUDGET,
    with_greedy: bool = False,
) -> list[list[Score]]:
    """Score continuations as the training forward scores prefix and continuation together.

    Args:
        prefixes: ids, at least one each, such as bos.
        continuations: of each prefix, any number; ids, at least one each.
        token_budget: of a forward pass. A prefix longer than half of it brings twice its length, if it has so many
            continuations; with more than that it is computed again, as beginnings are in every pass that needs them.
        with_greedy: whether `is_greedy` is wanted. It forms the logits once more, chunk by chunk.
    Returns:
        For each prefix the scores of its continuations, in the order given.
    Raises:
        InputError: something is empty, longer than the context, or holds ids that the model does not know.
    """
    _check(model.config, prefixes, continuations)
    scores = [[Score([], None)] * len(own) for own in continuations]
    # All passes are launched before the first result is waited for.
    passes = []
    for branches in plan_passes(prefixes, continuations, token_budget, TABLE_ENTRIES):
        passes.append((branches, *_forward(model, pack(branches, prefixes, continuations), with_greedy)))
    for branches, logprobs, are_likeliest in passes:
        values, flags = iter(logprobs.tolist()), iter([] if are_likeliest is None else are_likeliest.tolist())
        for at, _, chosen in branches:
            for index in chosen:
                length = len(continuations[at][index])
                is_greedy = all([next(flags) for _ in range(length)]) if with_greedy else None
                scores[at][index] = Score([next(values) for _ in range(length)], is_greedy)
    return scores


@dataclass(frozen=True)
class SharedKeys:
    """Attention within a batch whose documents share keys: `model.transformer.Cache`."""

    layout: Layout
    table: Tensor

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        k, v, layout = k.unsqueeze(1), v.unsqueeze(1), self.layout  # [T, 1, K, h]: pages of one token
        bounds = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_q, layout.max_k
        return attention(q, k, v, *bounds, window=window, block_table=self.table)


def _forward(model: CausalLM, packed: Packed, with_greedy: bool) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities fp32 [N], whether each target is the likeliest token)"""
    weight, layout = model.head_weight, packed.layout
    bounds = (x.to(weight.device, non_blocking=True) for x in (layout.cu_seqlens_q, layout.cu_seqlens_k, packed.table))
    cu_seqlens_q, cu_seqlens_k, table = bounds
    keys = SharedKeys(Layout(cu_seqlens_q, cu_seqlens_k, layout.max_q, layout.max_k), table)
    inputs = packed.tokens, packed.positions, packed.rows, packed.targets
    tokens, positions, rows, targets = (x.to(weight.device, non_blocking=True) for x in inputs)
    hidden = model.model(tokens, positions, None, cache=keys)[rows]  # [N, d]
    logprobs, _, _ = linear_logprob(hidden, weight, targets)
    if not with_greedy:
        return logprobs, None
    products, parts = HeadProducts(weight), chunks(len(hidden), len(weight), hidden.dtype, hidden.device)
    return logprobs, torch.cat([products.logits(hidden[part]).argmax(dim=1) for part in parts]) == targets


def _check(
    config: ModelConfig, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> None:
    if len(prefixes) != len(continuations):
        raise InputError(f"{len(prefixes)} prefixes have {len(continuations)} lists of continuations. Give one each.")
    for at, (prefix, own) in enumerate(zip(prefixes, continuations, strict=True)):
        if not prefix or not all(own):
            what = "continuation of it" if prefix else "prefix"
            raise InputError(f"prefix {at}: the {what} is empty. Give at least one token, such as bos.")
        longest = len(prefix) + max(map(len, own), default=1) - 1
        if longest > config.rope_length:
            limit = config.rope_length
            raise InputError(f"prefix {at}: {longest} tokens with its continuation, the context is {limit}. Cut it.")
        ids = [min(map(min, (prefix, *own))), max(map(max, (prefix, *own)))]
        if ids[0] < 0 or ids[1] >= config.vocab_size:
            known = f"the model knows 0 to {config.vocab_size - 1}"
            raise InputError(f"prefix {at}: ids from {ids[0]} to {ids[1]}; {known}. Use the model's own tokenizer.")
