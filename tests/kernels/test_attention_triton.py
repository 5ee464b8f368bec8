"""Our own attention: the Triton kernels against the reference, and the order in which their tiles are computed.

Blocks are small here, so that short documents cross their borders; the blocks that the launch table names are met in
tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from kernels import backend
from kernels.attention import attention_reference, dkdv, dq, forward, schedule
from kernels.attention.op import attention_op
from kernels.attention.reference import visible_keys
from tests.kernels import oracle
from tests.kernels.faces import DEVICE, each_face, triton_face
from tests.kernels.oracle import random

# The gradients of queries and keys are sums of P (dP - mean dP): with few keys they all but cancel.
assert_faithful = partial(oracle.assert_faithful, cancels=True)

# Not square, and another shape for each kernel: rows taken for columns would show.
SMALL = {forward: (32, 16), dq: (16, 32), dkdv: (32, 16)}
RAGGED = [1, 33, 0, 15, 48, 0]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, (rows, columns) in SMALL.items():
        blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": 4, "num_stages": 1}
        monkeypatch.setattr(module, "chosen", lambda *_, blocks=blocks: dict(blocks))


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def qkv(
    lengths_q: Sequence[int], lengths_k: Sequence[int], heads: int, kv_heads: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(sum(lengths_q), heads, width, seed=1, dtype=dtype),
        random(sum(lengths_k), kv_heads, width, seed=2, dtype=dtype),
        random(sum(lengths_k), kv_heads, width, seed=3, dtype=dtype),
    )


def with_statistics(lengths_q: Sequence[int], lengths_k: Sequence[int], window: int | None = None) -> Callable:
    """(q, k, v) -> (out, log-sum-exp)"""
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    cu_seqlens = bounds(lengths_q), bounds(lengths_k)
    return lambda q, k, v: attention_op(q, k, v, *cu_seqlens, *longest, q.shape[2] ** -0.5, window)


def ours(lengths_q: Sequence[int], lengths_k: Sequence[int], window: int | None = None) -> Callable[..., Tensor]:
    run = with_statistics(lengths_q, lengths_k, window)
    return lambda q, k, v: run(q, k, v)[0]


def reference(lengths_q: Sequence[int], lengths_k: Sequence[int], window: int | None = None) -> Callable[..., Tensor]:
    cu_seqlens = bounds(lengths_q), bounds(lengths_k)
    return lambda q, k, v: attention_reference(q, k, v, *cu_seqlens, scale=q.shape[2] ** -0.5, window=window)


def results(run: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """Result and gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("face", ["triton"], indirect=True)
@pytest.mark.parametrize("length", [1023, 1024, 1025])
def test_long_documents_are_faithful_with_the_blocks_of_the_table(length: int, face: str) -> None:
    inputs = qkv([length], [length], 1, 1, 64, torch.float16)
    assert_faithful(ours([length], [length]), reference([length], [length]), inputs)


@triton_face
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([1], [1]),
        (RAGGED, RAGGED),
        ([3, 1, 32, 0], [49, 40, 33, 5]),
        ([40, 2, 3], [17, 0, 3]),
        ([0], [0]),
    ],
    ids=["one token", "training", "prefixes", "fewer keys than queries", "no tokens"],
)
@pytest.mark.usefixtures("small_blocks")
def test_kernels_are_faithful(
    lengths_q: list[int], lengths_k: list[int], window: int | None, face: str, dtype: torch.dtype
) -> None:
    inputs = qkv(lengths_q, lengths_k, 2, 1, 16, dtype)
    assert_faithful(ours(lengths_q, lengths_k, window), reference(lengths_q, lengths_k, window), inputs)


@triton_face
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(1, 1, 8), (2, 2, 16), (4, 2, 32), (2, 1, 64), (1, 1, 80), (3, 1, 96), (2, 1, 128), (1, 1, 256)],
)
def test_kernels_are_faithful_for_every_width_and_grouping_with_blocks_of_the_table(
    heads: int, kv_heads: int, width: int, face: str, dtype: torch.dtype
) -> None:
    lengths_q, lengths_k = [129, 2], [129, 34]
    inputs = qkv(lengths_q, lengths_k, heads, kv_heads, width, dtype)
    assert_faithful(ours(lengths_q, lengths_k, 100), reference(lengths_q, lengths_k, 100), inputs)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3),
    groups=st.sampled_from([(1, 1), (3, 1), (2, 2)]),
    window=st.sampled_from([None, 1, 30]),
)
def check_any_lengths(documents: list[tuple[int, int]], groups: tuple[int, int], window: int | None) -> None:
    lengths_q, lengths_k = zip(*documents, strict=True)
    inputs = qkv(lengths_q, lengths_k, *groups, 16, torch.float32)
    assert_faithful(ours(lengths_q, lengths_k, window), reference(lengths_q, lengths_k, window), inputs)


@pytest.mark.usefixtures("small_blocks")
def test_kernels_are_faithful_for_any_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "FACE", "triton")
    check_any_lengths()


@triton_face
@pytest.mark.usefixtures("small_blocks")
def test_programs_take_turns_where_documents_are_shorter_than_a_tile(face: str, dtype: torch.dtype) -> None:
    lengths = [1, 2, 0, 3] * 4
    assert schedule.programs(len(lengths), sum(lengths), 32, 3) < len([n for n in lengths if n])
    assert_faithful(ours(lengths, lengths), reference(lengths, lengths), qkv(lengths, lengths, 2, 1, 16, dtype))


@each_face
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.usefixtures("small_blocks")
def test_the_log_sum_exp_is_that_of_the_scores_and_zero_without_keys(window: int | None, face: str) -> None:
    lengths_q, lengths_k = [20, 33, 2], [5, 50, 0]
    q, k, v = qkv(lengths_q, lengths_k, 4, 2, 16, torch.float32)
    out, lse = with_statistics(lengths_q, lengths_k, window)(q, k, v)
    assert lse.shape == (4, 55) and lse.dtype == torch.float32
    scores = torch.einsum("qhd,khd->hqk", q[20:53].double(), k[5:].double().repeat_interleave(2, dim=1)) / 4
    scores = scores.masked_fill(~visible_keys(33, 50, window, q.device), float("-inf"))
    assert torch.allclose(lse[:, 20:53].double(), scores.logsumexp(dim=-1), rtol=1e-6, atol=1e-6)
    for blind in (slice(0, 15), slice(53, 55)):
        assert (lse[:, blind] == 0).all() and (out[blind] == 0).all()


@triton_face
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.usefixtures("small_blocks")
def test_a_document_alone_and_packed_is_bitwise_the_same(window: int | None, face: str, dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [9, 34, 3], [9, 50, 3]
    inputs = qkv(lengths_q, lengths_k, 2, 1, 16, dtype)
    upstream = random(46, 2, 16, seed=7, dtype=dtype)
    packed = results(ours(lengths_q, lengths_k, window), inputs, upstream)
    queries, keys = slice(9, 43), slice(9, 59)
    alone = results(ours([34], [50], window), [inputs[0][queries], *(x[keys] for x in inputs[1:])], upstream[queries])
    for single, among, rows in zip(alone, packed, (queries, queries, keys, keys), strict=True):
        assert torch.equal(single, among[rows])


@triton_face
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's, for the very rows that are meant to be NaN
@pytest.mark.usefixtures("small_blocks")
def test_a_document_of_nan_reaches_no_other(face: str, dtype: torch.dtype) -> None:
    lengths = [20, 30, 17]
    inputs = qkv(lengths, lengths, 2, 1, 16, dtype)
    upstream = random(67, 2, 16, seed=7, dtype=dtype)
    before = results(ours(lengths, lengths), inputs, upstream)
    for x in (*inputs, upstream):
        x[20:50] = float("nan")
    for clean, spoilt in zip(before, results(ours(lengths, lengths), inputs, upstream), strict=True):
        assert torch.equal(clean[:20], spoilt[:20]) and torch.equal(clean[50:], spoilt[50:])
        assert spoilt[20:50].isnan().all()


@triton_face
@pytest.mark.usefixtures("small_blocks")
def test_runs_are_bitwise_equal_also_when_heads_go_by_sections(
    face: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [1, 34]
    inputs = qkv(lengths, lengths, 3, 3, 16, dtype)
    upstream = random(35, 3, 16, seed=7, dtype=dtype)
    runs = [results(ours(lengths, lengths), inputs, upstream) for _ in range(2)]
    head_bytes = 2 * 35 * 16 * dtype.itemsize
    monkeypatch.setattr(schedule, "SECTION_BYTES", 2 * head_bytes)
    assert schedule.section_of(3, head_bytes) == 2  # the last section is smaller than the others
    runs.append(results(ours(lengths, lengths), inputs, upstream))
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


@triton_face
@pytest.mark.usefixtures("small_blocks")
def test_inputs_are_read_where_they_lie(face: str, dtype: torch.dtype) -> None:
    lengths = [10, 23]
    upstream = random(33, 4, 16, seed=7, dtype=dtype)
    q, k, v = random(33, 8, 16, dtype=dtype).split((4, 2, 2), dim=1)  # of a fused projection
    heads_apart = q.transpose(0, 1).contiguous().transpose(0, 1)
    columns_apart = k.transpose(0, 2).contiguous().transpose(0, 2)
    expected = results(ours(lengths, lengths), [x.contiguous() for x in (q, k, v)], upstream)
    strided = results(ours(lengths, lengths), (q, k, v), upstream.transpose(0, 1).contiguous().transpose(0, 1))
    scattered = results(ours(lengths, lengths), (heads_apart, columns_apart, v), upstream)
    for plain, *others in zip(expected, strided, scattered, strict=True):
        assert all(torch.equal(plain, other) for other in others)


def paged(x: Tensor, lengths: Sequence[int], page: int) -> tuple[Tensor, Tensor]:
    """x as a cache of shuffled pages, and their table. What holds no key is NaN."""
    counts = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(0)).to(x.device)
    cache = x.new_full((len(order), page, *x.shape[1:]), float("nan"))
    table = torch.full((len(lengths), max(counts) + 1), len(order) + 10**6, dtype=torch.int32, device=x.device)
    row, used = 0, 0
    for d, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[d, :count] = order[used : used + count]
        flat = x.new_full((count * page, *x.shape[1:]), float("nan"))
        flat[:n] = x[row : row + n]
        cache[order[used : used + count]] = flat.unflatten(0, (count, page))
        row, used = row + n, used + count
    return cache, table


@each_face
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.usefixtures("small_blocks")
def test_a_paged_cache_gives_what_packed_keys_give(page: int, window: int | None, face: str) -> None:
    lengths_q, lengths_k = [3, 0, 20, 1], [70, 5, 20, 64]
    q, k, v = qkv(lengths_q, lengths_k, 4, 2, 16, torch.float32)
    (k_pages, table), (v_pages, _) = paged(k, lengths_k, page), paged(v, lengths_k, page)
    call: dict[str, Any] = {"scale": 0.25, "window": window}
    cu_seqlens = bounds(lengths_q), bounds(lengths_k)
    expected = attention_reference(q, k, v, *cu_seqlens, **call)
    assert torch.equal(attention_reference(q, k_pages, v_pages, *cu_seqlens, **call, block_table=table), expected)
    packed = attention_op(q, k, v, *cu_seqlens, 20, 70, **call)
    from_pages = attention_op(q, k_pages, v_pages, *cu_seqlens, 20, 70, **call, block_table=table)
    for one, other in zip(packed, from_pages, strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(from_pages[0], expected, atol=1e-5)


@each_face
def test_a_paged_cache_has_no_gradient_and_says_so(face: str) -> None:
    q, k, v = qkv([3], [16], 2, 1, 16, torch.float32)
    table = torch.zeros((1, 1), dtype=torch.int32, device=q.device)
    pages = k.unsqueeze(0).requires_grad_(), v.unsqueeze(0)
    out, _ = attention_op(q, *pages, bounds([3]), bounds([16]), 3, 16, 0.25, None, table)
    with pytest.raises(NotImplementedError, match="block table"):
        out.sum().backward()


@each_face
def test_the_op_keeps_its_word_to_the_dispatcher(face: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv([3, 5], [3, 5], 4, 2, 16, torch.float32))
    cu = bounds([3, 5])
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    opcheck(torch.ops.chimed.attention.default, (q, k, v, cu, cu, 5, 5, 0.25, 4, None), test_utils=checks)
    pages, table = k.detach().unsqueeze(0), torch.zeros((2, 1), dtype=torch.int32, device=q.device)
    arguments = q.detach(), pages, pages, cu, cu, 5, 5, 0.25, None, table
    opcheck(torch.ops.chimed.attention.default, arguments, test_utils=checks)


@each_face
def test_a_scale_that_is_not_above_zero_is_refused(face: str) -> None:
    q, k, v = qkv([3], [3], 1, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="scale"):
        attention_op(q, k, v, bounds([3]), bounds([3]), 3, 3, 0.0, None)


def tiles_by_falling_work(
    documents: Sequence[tuple[int, int]], block: int, window: int | None, over_keys: bool
) -> list[tuple[int, int]]:
    """(document, tile), written out: how many keys the last query of a tile sees, or queries its first key."""
    tiles = []
    for d, (n_q, n_k) in enumerate(documents):
        for tile in range(-(-(n_k if over_keys else n_q) // block)):
            last = min((tile + 1) * block, n_q) - 1 + n_k - n_q  # key at which the last query stands
            work = min(n_q, n_k - tile * block) if over_keys else last + 1
            work = work if window is None else min(work, window + block - 1)
            tiles.append((-work, d, tile if over_keys else -tile))
    return [(d, abs(tile)) for _, d, tile in sorted(tiles)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=20),
    window=st.sampled_from([None, 1, 25]),
    over_keys=st.booleans(),
)
def check_order(documents: list[tuple[int, int]], window: int | None, over_keys: bool) -> None:
    lengths_q, lengths_k = zip(*documents, strict=True)
    cu_seqlens = bounds(lengths_q), bounds(lengths_k)
    rows = sum(lengths_k if over_keys else lengths_q)
    rows_of_list = schedule.make_schedule(*cu_seqlens, rows, 16, window, over_keys=over_keys)
    if rows == 0:
        return
    count = int(rows_of_list[0, 0])
    found = rows_of_list[1 : 1 + count].tolist()
    assert [(d, tile) for d, tile, *_ in found] == tiles_by_falling_work(documents, 16, window, over_keys)
    for d, _, *bounds_of_document in found:
        start_q, start_k = (int(cu[d]) for cu in cu_seqlens)
        assert bounds_of_document == [start_q, lengths_q[d], start_k, lengths_k[d]]


@pytest.mark.parametrize("looked_at", [16, 1024])
def test_the_schedule_names_every_tile_once_in_order_of_falling_work(
    looked_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "FACE", "triton")
    monkeypatch.setattr(schedule, "FEW", 0)
    monkeypatch.setattr(schedule, "MANY", looked_at)  # 16: more documents than one step looks at
    check_order()
