"""Attention over packed documents: every face against the reference, and no document minds another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from kernels.attention import attention, attention_reference
from tests.kernels import oracle
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

# The gradients of queries and keys are sums of P (dP - mean dP): with few keys they all but cancel.
assert_faithful = partial(oracle.assert_faithful, cancels=True)


def bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def qkv(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random(sum(lengths_q), heads, width, seed=1, dtype=dtype),
        random(sum(lengths_k), kv_heads, width, seed=2, dtype=dtype),
        random(sum(lengths_k), kv_heads, width, seed=3, dtype=dtype),
    )


def face(lengths_q: Sequence[int], lengths_k: Sequence[int], window: int | None) -> Callable[..., Tensor]:
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    return lambda q, k, v: attention(q, k, v, bounds(lengths_q), bounds(lengths_k), *longest, window=window)


def reference(
    lengths_q: Sequence[int], lengths_k: Sequence[int], window: int | None, width: int
) -> Callable[..., Tensor]:
    cu_seqlens = {"cu_seqlens_q": bounds(lengths_q), "cu_seqlens_k": bounds(lengths_k)}
    return partial(attention_reference, **cu_seqlens, scale=width**-0.5, window=window)


def test_the_reference_is_softmax_attention_written_out() -> None:
    q, k, v = qkv([3], [5], heads=2, kv_heads=1, width=4)
    out = reference([3], [5], None, 4)(q, k, v)
    for i in range(3):
        for head in range(2):
            seen = i + 5 - 3 + 1
            weights = torch.softmax(k[:seen, 0] @ q[i, head] / 2, dim=0)
            assert torch.allclose(out[i, head], weights @ v[:seen, 0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [
        ([1], [1]),
        ([1, 33, 0, 7, 0], [1, 33, 0, 7, 0]),
        ([3, 1, 8], [9, 40, 8]),
        ([6, 2], [2, 0]),
    ],
    ids=["one token", "training", "prefixes", "fewer keys than queries"],
)
def test_attention_is_faithful(
    lengths_q: list[int], lengths_k: list[int], window: int | None, dtype: torch.dtype
) -> None:
    inputs = qkv(lengths_q, lengths_k, heads=4, kv_heads=2, width=16, dtype=dtype)
    assert_faithful(face(lengths_q, lengths_k, window), reference(lengths_q, lengths_k, window, 16), inputs)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 64), (6, 6, 80), (6, 1, 96), (8, 4, 128), (2, 1, 256)])
def test_attention_is_faithful_for_every_grouping_and_width(heads: int, kv_heads: int, width: int) -> None:
    lengths = [130, 3, 65]
    assert_faithful(
        face(lengths, lengths, None),
        reference(lengths, lengths, None, width),
        qkv(lengths, lengths, heads, kv_heads, width),
    )


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    window=st.sampled_from([None, 1, 7, 64]),
)
def test_attention_is_faithful_for_any_lengths(
    documents: list[tuple[int, int]], groups: tuple[int, int], window: int | None
) -> None:
    lengths_q, lengths_k = zip(*documents, strict=True)
    inputs = qkv(lengths_q, lengths_k, *groups, 8)
    assert_faithful(face(lengths_q, lengths_k, window), reference(lengths_q, lengths_k, window, 8), inputs)


@pytest.mark.parametrize("window", [None, 20])
def test_a_document_alone_and_packed_is_bitwise_the_same(window: int | None) -> None:
    lengths = [17, 200, 64, 1]
    inputs = qkv(lengths, lengths, heads=4, kv_heads=2, width=32)

    def run(start: int, end: int, sizes: list[int]) -> list[Tensor]:
        leaves = [x[start:end].clone().requires_grad_() for x in inputs]
        out = face(sizes, sizes, window)(*leaves)
        out.backward(random(sum(lengths), 4, 32, seed=7)[start:end])
        return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    packed = run(0, sum(lengths), lengths)
    alone = run(17, 217, [200])
    for ours, theirs in zip(alone, packed, strict=True):
        assert torch.equal(ours, theirs[17:217])


def test_changing_one_document_leaves_the_others_bitwise_alone() -> None:
    lengths = [50, 70, 30]
    q, k, v = qkv(lengths, lengths, heads=4, kv_heads=4, width=32)
    before = face(lengths, lengths, None)(q, k, v)
    for x in (q, k, v):
        x[50:120] = float("nan")
    after = face(lengths, lengths, None)(q, k, v)
    assert torch.equal(before[:50], after[:50]) and torch.equal(before[120:], after[120:])
    assert after[50:120].isnan().all()


def test_the_future_does_not_reach_the_past() -> None:
    q, k, v = qkv([40], [40], heads=2, kv_heads=2, width=16)
    before = face([40], [40], None)(q, k, v)
    k[25:], v[25:] = 100.0, -100.0
    assert torch.equal(before[:25], face([40], [40], None)(q, k, v)[:25])


def test_a_query_sees_its_window_and_no_further() -> None:
    q, k, v = qkv([40], [40], heads=2, kv_heads=2, width=16)
    before = face([40], [40], 8)(q, k, v)
    k[:20], v[:20] = 100.0, -100.0
    after = face([40], [40], 8)(q, k, v)
    assert torch.equal(before[27:], after[27:])
    assert not torch.equal(before[26], after[26])


def test_faces_pass_gradcheck() -> None:
    lengths_q, lengths_k = [3, 0, 4], [5, 0, 4]
    inputs = [x.requires_grad_() for x in qkv(lengths_q, lengths_k, 4, 2, 4, dtype=torch.float64)]
    for window in (None, 2):
        assert gradcheck(face(lengths_q, lengths_k, window), inputs)


def test_queries_cut_from_a_fused_projection_are_accepted() -> None:
    fused = random(30, 8, 16)
    q, k, v = fused.split((4, 2, 2), dim=1)
    run = face([10, 20], [10, 20], None)
    assert torch.equal(run(q, k, v), run(q.contiguous(), k.contiguous(), v.contiguous()))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = qkv([4], [4], heads=4, kv_heads=2, width=8)
    cu = bounds([4])
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k[:, :, :4], v[:, :, :4], cu, cu, 4, 4)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :3], k, v, cu, cu, 4, 4)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attention(q, k, v, cu, bounds([2, 2]), 4, 4)
    with pytest.raises(ValueError, match="window"):
        attention(q, k, v, cu, cu, 4, 4, window=0)
