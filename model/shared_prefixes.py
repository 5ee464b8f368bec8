"""Prefixes that begin alike, arranged so that a forward pass computes their common beginnings once.

Sorted as texts, prefixes are a tree written down branch by branch: each one shares with those before it what it shares
with the one right before it. So in

    E E E E a a a .
    E E E E b b b b .
    E E E E b b c c c .

the second adds four tokens to a pass and the third three: a document each, whose keys are the rows of the beginning,
wherever they lie, and then its own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.batch import Layout

# Tokens that two prefixes must have in common to be kept together. Nearly all of them begin with bos or with the first
# words of a template; those are better kept with others of their length, so that lines of a block table are filled.
LEAST_SHARED = 16


class Branch(NamedTuple):
    """A prefix in a pass.

    prefix: its number.
    shared: of its tokens, those that the branch before it in the pass has too.
    continuations: the numbers of those that are scored here.
    """

    prefix: int
    shared: int
    continuations: list[int]


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


def plan_passes(
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    token_budget: int,
    table_entries: int,
) -> Iterator[list[Branch]]:
    """What goes into each forward pass.

    Args:
        token_budget: of a pass; of one with a prefix longer than half of it, twice its length.
        table_entries: of a block table, unless a single continuation needs more.
    """
    branches: list[Branch] = []
    tokens, documents, longest = 0, 0, 0
    for at, shared in _in_order(prefixes, continuations):
        prefix, is_new = len(prefixes[at]), True
        for index, continuation in enumerate(continuations[at]):
            reach, own = prefix + len(continuation) - 1, len(continuation) - 1
            new_tokens = own + (prefix - shared if is_new else 0)
            new_documents = (own > 0) + (is_new and prefix > shared)
            is_full = tokens + new_tokens > max(token_budget, 2 * prefix)
            if branches and (is_full or (documents + new_documents) * max(longest, reach) > table_entries):
                yield branches
                branches, tokens, documents, longest = [], 0, 0, 0
                is_new = True
            if is_new:
                shared = shared if branches else 0
                new_tokens, new_documents = own + prefix - shared, (own > 0) + (prefix > shared)
                branches.append(Branch(at, shared, []))
                is_new = False
            branches[-1].continuations.append(index)
            tokens, documents, longest = tokens + new_tokens, documents + new_documents, max(longest, reach)
    if branches:
        yield branches


def _in_order(
    prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[int, int]]:
    """Prefixes with something to score, and how many tokens each shares with the one before it.

    Those that share a beginning stand together. The longest first, so that those of a pass are about as long, and
    memory runs out at once or never.
    """
    keys = {at: array("i", prefix).tobytes() for at, prefix in enumerate(prefixes) if continuations[at]}
    families: list[list[tuple[int, int]]] = []
    before = b""
    for at in sorted(keys, key=keys.__getitem__):
        shared = _common(before, keys[at]) // array("i").itemsize
        if shared >= LEAST_SHARED:
            families[-1].append((at, shared))
        else:
            families.append([(at, 0)])
        before = keys[at]

    def size(family: list[tuple[int, int]]) -> int:
        return max(len(prefixes[at]) + sum(map(len, continuations[at])) for at, _ in family)

    return [place for family in sorted(families, key=size, reverse=True) for place in family]


def _common(a: bytes, b: bytes) -> int:
    """Bytes at the beginning that are equal."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    pair = np.frombuffer(a, np.uint8, length), np.frombuffer(b, np.uint8, length)
    return int(np.argmax(pair[0] != pair[1]))


def pack(
    branches: Sequence[Branch], prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
) -> Packed:
    """The flat batch of a pass. Wanted tokens stand in the order of branches and of their continuations."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    lengths = [(0, 0)]  # of every document, queries and keys
    lines: list[np.ndarray] = []  # of the table
    path = np.empty(0, np.int32)  # the row of every token of a branch

    def grow(before: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """Add a document, unless it is empty; the rows of its beginning and its own."""
        own = np.arange(len(tokens), len(tokens) + len(ids), dtype=np.int32)
        grown = np.concatenate([before, own])
        if len(ids):
            tokens.extend(ids)
            positions.extend(range(len(before), len(grown)))
            lengths.append((len(ids), len(grown)))
            lines.append(grown)
        return grown

    for at, shared, chosen in branches:
        path = grow(path[:shared], prefixes[at][shared:])
        for index in chosen:
            continuation = continuations[at][index]
            rows += grow(path, continuation[:-1])[len(path) - 1 :].tolist()
            targets += continuation
    max_q, max_k = map(max, zip(*lengths, strict=True))
    cu_seqlens_q, cu_seqlens_k = torch.tensor(lengths).cumsum(dim=0).int().t().contiguous()
    table = np.zeros((len(lines), max_k), np.int32)
    for line, grown in zip(table, lines, strict=True):
        line[: len(grown)] = grown
    layout = Layout(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    ids, at_position, wanted_from, wanted = (torch.tensor(x) for x in (tokens, positions, rows, targets))
    return Packed(ids, at_position, layout, torch.from_numpy(table), wanted_from, wanted)
