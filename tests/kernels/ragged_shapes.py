"""How many forms of each kernel ragged work asks for, as JSON: `python -m tests.kernels.ragged_shapes`.

A form is what Triton compiles once. Run as a program, because the process that runs the tests interprets kernels, and
no launch of it is specialised.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.attention import attention, decode_attention
from kernels.gae import gae
from kernels.linear_logprob import linear_logprob
from kernels.low_rank import low_rank_linear
from kernels.offline.record import record
from kernels.sample import sample


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def decode(rows: int, pages: int) -> None:
    """Rows that end and are replaced, at contexts that grow: from a plain cache, and through a table of pages."""
    q, lengths = empty(rows, 32, 128), empty(rows, dtype=torch.int32)
    decode_attention(q, *(empty(rows, 4096, 8, 128) for _ in range(2)), lengths)
    table = empty(rows, pages, dtype=torch.int32)
    decode_attention(q, *(empty(9000, 16, 8, 128) for _ in range(2)), lengths, block_table=table)


def attend(tokens: int, documents: int) -> None:
    """Packs of any size in training, prompts of any length behind a cache of pages."""
    q, k, v = (empty(tokens, heads, 128, grad=True) for heads in (32, 8, 8))
    bounds = empty(documents + 1, dtype=torch.int32)
    attention(q, k, v, bounds, bounds, 4096, 4096, provider="triton").backward(empty(*q.shape))
    cache, table = (empty(9000, 16, 8, 128) for _ in range(2)), empty(documents, 1 + tokens // 16, dtype=torch.int32)
    with torch.no_grad():
        attention(q, *cache, bounds, bounds, 4096, 4096, block_table=table, provider="triton")


def adapt(tokens: int, _: int) -> None:
    """Packs of any size through a layer with adapters."""
    x, a, b = (empty(*shape, grad=True) for shape in ((tokens, 4096), (48, 4096), (6144, 16)))
    y = low_rank_linear(x, empty(6144, 4096), None, a, b, 2.0, (4096, 1024, 1024))
    y.backward(empty(*y.shape))


def draw(rows: int, _: int) -> None:
    sample(empty(rows, 50264), 0.7, empty(rows, dtype=torch.int64), empty(rows, dtype=torch.int64))


def score(tokens: int, documents: int) -> None:
    """Trajectories of any number of tokens, under a policy that learns from them."""
    hidden, weight = empty(tokens, 4096, grad=True), empty(39424, 4096, grad=True)
    of_tokens = [empty(tokens, dtype=torch.float32) for _ in range(2)]
    logprob, entropy, _ = linear_logprob(hidden, weight, empty(tokens, dtype=torch.int64), of_tokens[0], True)
    torch.autograd.backward([logprob, entropy], of_tokens)
    bounds, mask = empty(documents + 1, dtype=torch.int32), empty(tokens, dtype=torch.bool)
    gae(*of_tokens, bounds, mask, 1.0, 0.95)


def forms(work: Callable[[int, int], None], numbers: list[tuple[int, int]]) -> dict[str, int]:
    found = defaultdict(set)
    for pair in numbers:
        for launch in record(partial(work, *pair), 90):
            found[launch.name].add((launch.signature, launch.constants, launch.aligned, launch.options))
    return {name: len(kinds) for name, kinds in found.items()}


if __name__ == "__main__":
    chance = random.Random(0)
    rows = [(n, chance.choice([1, 16 * n, 3000 // n])) for n in (1, 2, 7, 16, 33, 64, 100, 128, 200, 256)]
    packs = [(chance.choice([n, 16 * n]), n) for n in (1, 2, 16, 33, 100, 256, 1000)]
    found = (
        forms(decode, rows),
        *(forms(work, packs) for work in (attend, adapt)),
        forms(draw, rows),
        forms(score, packs),
    )
    print(json.dumps({name: count for counts in found for name, count in counts.items()}))
