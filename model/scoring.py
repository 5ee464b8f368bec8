"""Log-probabilities of given continuations: many for each prefix, which is computed once.

A forward pass takes prefixes and, behind each, its continuations without their last tokens, in one flat batch:

    A A A A A A A A . A1 A1 A1 . A2 . B B B B B . B1 . B2 B2 . ...

Every continuation is a document of its own. Its keys are those of its prefix and then its own, wherever in the batch
they lie: a block table with pages of one token says where, so no key is moved or held twice. Nothing is padded, and
only hidden states that predict a wanted token meet the head, which keeps no logits. What a continuation of one token
needs is the last hidden state of its prefix, so the letters of a multiple choice cost nothing beside the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
            continuations; with more than that it is computed again.
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
    for pairs in _passes(prefixes, continuations, token_budget):
        packed = _pack([(prefixes[at], [continuations[at][index] for index in own]) for at, own in pairs.items()])
        passes.append((pairs, *_forward(model, packed, with_greedy)))
    for pairs, logprobs, are_likeliest in passes:
        values, flags = iter(logprobs.tolist()), iter([] if are_likeliest is None else are_likeliest.tolist())
        for at, own in pairs.items():
            for index in own:
                length = len(continuations[at][index])
                is_greedy = all([next(flags) for _ in range(length)]) if with_greedy else None
                scores[at][index] = Score([next(values) for _ in range(length)], is_greedy)
    return scores


@dataclass(frozen=True)
class Packed:
    """A forward pass, on the host.

    tokens, positions: int64 [T].
    layout: of prefixes and continuations, D documents.
    table: int32 [D, longest], the row of every key of every document.
    rows, targets: int64 [N], the tokens that are wanted, and whose hidden states predict them.
    """

    tokens: Tensor
    positions: Tensor
    layout: Layout
    table: Tensor
    rows: Tensor
    targets: Tensor


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


def _passes(
    prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]], token_budget: int
) -> Iterator[dict[int, list[int]]]:
    """What goes into each forward pass: prefix -> some of its continuations. The longest first, so that prefixes of
    a pass are about as long, and memory runs out at once or never."""
    sizes = [len(prefix) + sum(map(len, own)) for prefix, own in zip(prefixes, continuations, strict=True)]
    pairs: dict[int, list[int]] = {}
    tokens, documents, longest = 0, 0, 0
    for at in sorted(range(len(sizes)), key=lambda at: -sizes[at]):
        prefix = len(prefixes[at])
        for index, continuation in enumerate(continuations[at]):
            reach, own = prefix + len(continuation), len(continuation) - 1
            new = (own, 1) if at in pairs else (own + prefix, 2)
            is_full = tokens + new[0] > max(token_budget, 2 * prefix)
            if pairs and (is_full or (documents + new[1]) * max(longest, reach) > TABLE_ENTRIES):
                yield pairs
                pairs, tokens, documents, longest = {}, 0, 0, 0
                new = own + prefix, 2
            pairs.setdefault(at, []).append(index)
            tokens, documents, longest = tokens + new[0], documents + new[1], max(longest, reach)
    if pairs:
        yield pairs


def _pack(pairs: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Packed:
    """A flat batch of prefixes and their continuations."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    documents: list[tuple[range, range]] = []  # rows of the prefix, and of the document itself
    for prefix, continuations in pairs:
        before = range(len(tokens), len(tokens) + len(prefix))
        documents.append((range(0), before))
        tokens += prefix
        positions += range(len(prefix))
        for continuation in continuations:
            own = range(len(tokens), len(tokens) + len(continuation) - 1)
            tokens += continuation[:-1]
            positions += range(len(before), len(before) + len(own))
            rows += [before[-1], *own]
            targets += continuation
            if own:
                documents.append((before, own))
    lengths = torch.tensor([(0, 0), *((len(own), len(before) + len(own)) for before, own in documents)])  # [D+1, 2]
    max_q, max_k = lengths.amax(dim=0).tolist()
    cu_seqlens_q, cu_seqlens_k = lengths.cumsum(dim=0).int().t().contiguous()
    table = torch.zeros(len(documents), max_k, dtype=torch.int32)
    for line, (before, own) in zip(table, documents, strict=True):
        line[: len(before)] = torch.arange(before.start, before.stop)
        line[len(before) : len(before) + len(own)] = torch.arange(own.start, own.stop)
    layout = Layout(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    ids, at, wanted_from, wanted = (torch.tensor(x) for x in (tokens, positions, rows, targets))
    return Packed(ids, at, layout, table, wanted_from, wanted)


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
