"""Decoding against a cache: both faces against the reference, both layouts, rows of any length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from kernels.attention import attention_reference
from kernels.attention import decode as module
from kernels.attention.decode import SHORTEST, decode_attention, decode_attention_reference
from tests.kernels import oracle
from tests.kernels.faces import DEVICE, each_face, faces, triton_face
from tests.kernels.oracle import random

# A row that sees nothing, a single key, exactly one stretch, one key more, and the whole cache.
LENGTHS = [0, 1, SHORTEST, SHORTEST + 1, 2 * SHORTEST + 47]
CAPACITY = 2 * SHORTEST + 48


def int32(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cached(
    lengths: Sequence[int], capacity: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, both caches and lengths; what lies beyond a row's length is NaN."""
    rows = len(lengths)
    q = random(rows, heads, width, dtype=dtype)
    caches = [random(rows, capacity, kv_heads, width, seed=seed, dtype=dtype) for seed in (1, 2)]
    for row, length in enumerate(lengths):
        for cache in caches:
            cache[row, length:] = float("nan")
    return q, *caches, int32(lengths)


def paged(k_cache: Tensor, v_cache: Tensor, lengths: Sequence[int], page: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same caches in shuffled pages among others full of NaN, and the block table.

    Entries of the table beyond a row's length point nowhere.
    """
    rows, capacity, *shape = k_cache.shape
    used = -(-capacity // page)
    order = torch.randperm(rows * used + 3, generator=torch.Generator().manual_seed(5))[: rows * used]
    table = order.view(rows, used).to(DEVICE, torch.int32)
    pages = []
    for cache in (k_cache, v_cache):
        padded = cache.new_full((rows, used * page, *shape), float("nan"))
        padded[:, :capacity] = cache
        pool = cache.new_full((rows * used + 3, page, *shape), float("nan"))
        pool[table.flatten().long()] = padded.view(rows * used, page, *shape)
        pages.append(pool)
    for row, length in enumerate(lengths):
        table[row, -(-length // page) :] = -1
    return *pages, table


def assert_faithful(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None = None, table: Tensor | None = None
) -> None:
    options: dict[str, Any] = {"lengths": lengths, "scale": 0.3, "window": window, "block_table": table}
    face, reference = partial(decode_attention, **options), partial(decode_attention_reference, **options)
    oracle.assert_faithful(face, reference, (q, k_cache, v_cache), has_gradients=False)


@faces
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("page", [None, 48, 256])
def test_decoding_is_faithful(page: int | None, window: int | None, face: str, dtype: torch.dtype) -> None:
    q, k_cache, v_cache, lengths = cached(LENGTHS, CAPACITY, 4, 2, 16, dtype)
    table = None
    if page is not None:
        k_cache, v_cache, table = paged(k_cache, v_cache, LENGTHS, page)
    assert_faithful(q, k_cache, v_cache, lengths, window, table)


@faces
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(1, 1, 32), (8, 2, 64), (8, 1, 80), (7, 1, 96), (2, 2, 128), (19, 1, 16), (2, 1, 256), (2, 1, 37)],
)
def test_decoding_is_faithful_for_every_grouping_and_width(
    heads: int, kv_heads: int, width: int, face: str, dtype: torch.dtype
) -> None:
    lengths = [SHORTEST + 5, 3]
    assert_faithful(*cached(lengths, SHORTEST + 8, heads, kv_heads, width, dtype))


@each_face
def test_a_large_cache_is_summed_from_many_stretches_and_a_small_one_from_one(face: str) -> None:
    for capacity, lengths in ((40 * SHORTEST, [5 * SHORTEST, 40 * SHORTEST]), (SHORTEST, [70, SHORTEST])):
        assert_faithful(*cached(lengths, capacity, 2, 1, 16, torch.float32))


@each_face
@pytest.mark.parametrize("window", [None, 50])
def test_the_last_query_of_a_document_is_decoded_as_attention_computes_it(face: str, window: int | None) -> None:
    lengths = [1, 30, 150]
    q, k, v = (random(sum(lengths), heads, 32, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    ends = torch.tensor(lengths).cumsum(0)
    bounds = int32([0, *ends.tolist()])
    caches = [torch.full((3, 160, 2, 32), float("nan"), device=DEVICE) for _ in range(2)]
    for cache, x in zip(caches, (k, v), strict=True):
        for row, document in enumerate(x.split(lengths)):
            cache[row, : len(document)] = document
    last = (ends - 1).to(DEVICE)
    options: dict[str, Any] = {"scale": 32**-0.5, "window": window}
    oracle.assert_faithful(
        lambda *_: decode_attention(q[last], *caches, int32(lengths), window=window),
        lambda q, k, v: attention_reference(q, k, v, bounds, bounds, **options)[last],
        (q, k, v),
        has_gradients=False,
    )


@triton_face
def test_repeated_runs_are_bitwise_equal(face: str, dtype: torch.dtype) -> None:
    inputs = cached(LENGTHS, CAPACITY, 4, 2, 32, dtype)
    assert torch.equal(decode_attention(*inputs), decode_attention(*inputs))


@each_face
def test_pages_hold_what_a_plain_cache_holds(face: str) -> None:
    """Bitwise, since keys are taken in the same blocks."""
    q, k_cache, v_cache, lengths = cached(LENGTHS, CAPACITY, 4, 2, 32, torch.float32)
    capacity = 3 * SHORTEST  # of the table's row too
    plain = [torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, capacity - CAPACITY)) for cache in (k_cache, v_cache)]
    *pages, table = paged(*plain, LENGTHS, 64)
    assert torch.equal(decode_attention(q, *pages, lengths, block_table=table), decode_attention(q, *plain, lengths))


@each_face
def test_queries_and_caches_may_be_parts_of_larger_tensors(face: str) -> None:
    lengths = int32([9, 40])
    fused = random(2, 8, 16)
    pool = random(2, 2, 64, 5, 16, seed=1)
    q, caches = fused[:, 2:6], [x[:, :48, 1:3] for x in pool]
    expected = decode_attention(q.contiguous(), *(x.contiguous() for x in caches), lengths)
    assert torch.equal(decode_attention(q, *caches, lengths), expected)
    strangers = caches[0].contiguous(), caches[1]  # whose strides differ
    assert torch.equal(decode_attention(q, *strangers, lengths), expected)


@each_face
def test_empty_batches_and_caches_give_empty_and_zero_results(face: str) -> None:
    nothing = random(0, 4, 16)
    assert decode_attention(nothing, *(random(0, 8, 2, 16) for _ in range(2)), int32([])).shape == (0, 4, 16)
    rows = random(3, 4, 16)
    empty = decode_attention(rows, *(random(3, 0, 2, 16) for _ in range(2)), int32([0, 0, 0]))
    assert torch.equal(empty, torch.zeros_like(rows))


@pytest.mark.gpu
def test_a_captured_call_follows_its_lengths() -> None:
    q, k_cache, v_cache, lengths = cached([5, 700], 1024, 8, 2, 64, torch.bfloat16)
    k_cache, v_cache = k_cache.nan_to_num(), v_cache.nan_to_num()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_attention(q, k_cache, v_cache, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(q, k_cache, v_cache, lengths)
    for now in ([5, 700], [0, 1024], [513, 1]):
        lengths.copy_(int32(now))
        graph.replay()
        assert torch.equal(captured, decode_attention(q, k_cache, v_cache, lengths))


def test_stretches_follow_from_shapes_and_stay_within_bounds() -> None:
    for capacity in (1, SHORTEST, 4096, 5000, 131072, 10**6):
        for programs in (1, 8, 512, 10**5):
            length = module._split_length(capacity, programs, 132)
            assert length % SHORTEST == 0 and length & (length - 1) == 0
            assert -(-capacity // length) <= module.MAX_SPLITS
            assert length <= max(module.LONGEST, 2 * capacity // module.MAX_SPLITS)
    # 64 rows of 8 key-value heads, 4096 tokens each: sixteen programs and more on each of 132 multiprocessors
    assert 64 * 8 * 4096 // module._split_length(4096, 64 * 8, 132) >= 16 * 132


def test_the_op_keeps_its_word_to_the_dispatcher() -> None:
    q, k_cache, v_cache, lengths = cached([3, 0], 8, 4, 2, 16, torch.float32)
    *pages, table = paged(k_cache, v_cache, [3, 0], 4)
    op = torch.ops.chimed.decode_attention.default
    opcheck(op, (q, k_cache, v_cache, lengths, None, 0.25, None))
    opcheck(op, (q, *pages, lengths, table, 0.25, 2))


def test_what_does_not_fit_is_refused() -> None:
    q, k_cache, v_cache, lengths = cached([3, 0], 8, 4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:, :3], k_cache, v_cache, lengths)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q, k_cache[:1], v_cache[:1], lengths)
    with pytest.raises(ValueError, match="the caches are"):
        decode_attention(q.half(), k_cache, v_cache, lengths)
    with pytest.raises(ValueError, match="lengths"):
        decode_attention(q, k_cache, v_cache, lengths.long())
    with pytest.raises(ValueError, match="block_table"):
        decode_attention(q, k_cache, v_cache, lengths, block_table=lengths)
    with pytest.raises(ValueError, match="window"):
        decode_attention(q, k_cache, v_cache, lengths, window=0)
    with pytest.raises(ValueError, match="no gradient"):
        decode_attention(q.requires_grad_(), k_cache, v_cache, lengths)
