"""How the ops on a head cut their work: nothing is lost at a boundary, and memory stays within what they promise."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import vocabulary
from kernels.backend import Chip, observed_launches
from kernels.linear_logprob import linear_logprob, linear_logprob_reference, vocabulary_slices
from tests.engine.live_bytes import LiveBytes
from tests.kernels.faces import DEVICE, each_face
from tests.kernels.heads import head, labels, loss_and_reference
from tests.kernels.oracle import assert_faithful, random

# Modules and the functions in them have the same names.
linear_logprob_module = importlib.import_module("kernels.linear_logprob")
linear_cross_entropy_module = importlib.import_module("kernels.linear_cross_entropy")
token_groups = linear_cross_entropy_module.token_groups

triton_only = pytest.mark.parametrize("face", ["triton"], indirect=True)
BF16, FP32 = torch.bfloat16, torch.float32
GIB = 1 << 30
# T, d, V
SHAPES = [
    (8192, 4096, 39424),
    (8192, 4096, 151936),
    (1, 4096, 151936),
    (1000, 128, 50257),
    (65536, 5120, 39424),
    (65536, 5120, 151936),
    (131072, 1024, 151936),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.mark.parametrize("length", [0, 1, 7, 128, 1000, 8192, 151936])
@pytest.mark.parametrize("largest", [1, 5, 127, 128, 4096])
def test_runs_cover_everything_once_and_evenly(length: int, largest: int) -> None:
    parts = vocabulary.runs(length, largest)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == max(1, -(-length // largest)) and max(sizes) <= largest
    assert all(size == sizes[0] for size in sizes[:-1])
    assert all(size % vocabulary.TILE == 0 for size in sizes[:-1]) or largest < vocabulary.TILE


def test_the_most_that_fits_is_whole_tiles() -> None:
    assert vocabulary.most(1000, 10) == 100
    assert vocabulary.most(1999, 10) == 128
    assert vocabulary.most(10, 1000) == 1


@each_face
@pytest.mark.parametrize("rows_at_once", [1, 3, 6, 7])
def test_chunks_of_logits_leave_the_results_as_they_are(
    rows_at_once: int, face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.WORKSPACE, DEVICE, rows_at_once * vocabulary.padded(101) * 4)
    targets = labels(7, 101)
    keywords = {"targets": targets, "with_entropy": True}
    inputs = head(7, 4, 101)
    assert_faithful(partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords), inputs)
    assert_faithful(*loss_and_reference(targets=targets), inputs)


@triton_only
@pytest.mark.parametrize(("workspace", "slices"), [(3000, 8), (14000, 3), (20000, 2), (28000, 1)])
def test_slices_of_the_vocabulary_add_up(
    workspace: int, slices: int, face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vocabulary.WORKSPACE, DEVICE, workspace)
    columns, _ = vocabulary_slices(11, 333, FP32, workspace)
    assert len(vocabulary.runs(333, columns)) == slices
    keywords = {"targets": labels(11, 333), "temperature": random(11, seed=8).abs() + 0.5, "with_entropy": True}
    inputs = head(11, 16, 333)
    assert_faithful(partial(linear_logprob, **keywords), partial(linear_logprob_reference, **keywords), inputs)


@triton_only
@pytest.mark.parametrize(("workspace", "groups"), [(3000, 10), (9000, 4), (20000, 2), (28000, 1)])
def test_groups_of_tokens_add_up(workspace: int, groups: int, face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vocabulary.WORKSPACE, DEVICE, workspace)
    group, chunk = token_groups(37, 101, 4, FP32, workspace)
    assert chunk <= group and len(vocabulary.runs(37, group)) == groups
    compared = loss_and_reference(targets=labels(37, 101), weights=random(37, seed=8), z_loss=0.1)
    assert_faithful(*compared, head(37, 4, 101))


def grid_vectors(rows: int, width: int, seed: int) -> Tensor:
    """Quarters, so that products and their sums are exact in fp32 in any order."""
    return (4 * random(rows, width, seed=seed)).round() / 4


@triton_only
def test_a_token_alone_and_among_others_is_bitwise_the_same(face: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = grid_vectors(11, 8, 0), grid_vectors(5000, 8, 1), labels(11, 5000, 0.0)
    heat = random(11, seed=8).abs() + 0.5

    def run(rows: slice) -> list[Tensor]:
        leaf = hidden[rows].requires_grad_()
        results = linear_logprob(leaf, weight, targets[rows], heat[rows], True)
        assert results[1] is not None
        return [x.detach() for x in results if x is not None]

    among = run(slice(0, 11))
    for workspace in (1 << 20, 100000):
        monkeypatch.setitem(vocabulary.WORKSPACE, DEVICE, workspace)
        for rows in (slice(0, 11), slice(3, 4), slice(2, 9)):
            assert all(torch.equal(alone, x[rows]) for alone, x in zip(run(rows), among, strict=True))


def test_rows_of_buffers_are_aligned_whatever_the_vocabulary() -> None:
    for columns in (1, 64, 101, 50257):
        rows = vocabulary.buffer(3, columns, BF16, torch.device("cpu"))
        assert rows.shape == (3, columns) and rows.stride(0) * 2 % 128 == 0


def bytes_beside_results(face: Callable[..., Any], *arguments: Any) -> int:
    """The most that a Triton face holds on a GPU beside its arguments and results."""
    known = LiveBytes()
    for argument in arguments:
        if isinstance(argument, Tensor):
            known.add(argument)
    before = known.total()
    with observed_launches(lambda *_: None, Chip(90, 132)), known as live:
        results = face(*arguments)
    return live.peak() - before - sum(x.untyped_storage().nbytes() for x in results)


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def held_by_cross_entropy(
    shape: tuple[int, int, int], dtype: torch.dtype, with_grad: bool = True, with_dweight: bool = True
) -> int:
    T, d, V = shape
    face = linear_cross_entropy_module._linear_cross_entropy_triton
    head = meta(T, d, dtype=dtype), meta(V, d, dtype=dtype), meta(T, dtype=torch.int64)
    return bytes_beside_results(face, *head, None, 0.0, with_grad, with_dweight)


def held_by_logprob(shape: tuple[int, int, int], dtype: torch.dtype, with_dweight: bool = True) -> tuple[int, int]:
    """In the forward and in the backward."""
    T, d, V = shape
    head = meta(T, d, dtype=dtype), meta(V, d, dtype=dtype), meta(T, dtype=torch.int64)
    rows = [meta(T, dtype=FP32) for _ in range(6)]
    forward = bytes_beside_results(linear_logprob_module._linear_logprob_fwd_triton, *head, None, True)
    backward = linear_logprob_module._linear_logprob_bwd_triton
    return forward, bytes_beside_results(backward, *rows[:3], *head, None, *rows[3:], with_dweight)


@shapes
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_memory_keeps_to_the_formula(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    T, d, V = shape
    workspace, of_rows = vocabulary.WORKSPACE["cuda"], 9 * T  # two numbers a row, and whether it counts
    copy = dtype.itemsize * T * d
    assert held_by_cross_entropy(shape, dtype) <= 4 * V * d + workspace + copy + of_rows
    assert held_by_cross_entropy(shape, dtype, with_grad=False, with_dweight=False) <= workspace + of_rows
    forward, backward = held_by_logprob(shape, dtype)
    assert forward <= workspace + of_rows
    assert backward <= workspace + copy + 4 * T * d + of_rows


@shapes
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_of_a_frozen_weight_the_workspace_is_all_there_is(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    limit = vocabulary.WORKSPACE["cuda"] + 9 * shape[0]
    assert held_by_cross_entropy(shape, dtype, with_dweight=False) <= limit
    assert max(held_by_logprob(shape, dtype, with_dweight=False)) <= limit


@each_face
@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_a_frozen_weight_gets_no_gradient_and_hidden_states_the_same(
    rows_at_once: int, face: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = head(7, 4, 101)
    targets = labels(7, 101)
    monkeypatch.setitem(vocabulary.WORKSPACE, DEVICE, rows_at_once * vocabulary.padded(101) * 8)
    asked = {"targets": targets, "temperature": random(7, seed=8).abs() + 0.5, "with_entropy": True}
    for ours, reference in (
        loss_and_reference(targets=targets, weights=random(7, seed=8), z_loss=0.1),
        (partial(linear_logprob, **asked), partial(linear_logprob_reference, **asked)),
    ):
        frozen = partial(on_frozen, reference, weight)
        assert_faithful(partial(on_frozen, ours, weight), frozen, [hidden])
    *_, of_loss = linear_cross_entropy_module._linear_cross_entropy_op(hidden, weight, targets, None, 0.0, True, False)
    rows = [random(7, seed=seed) for seed in range(3)]
    sums = None, random(7), random(7), random(7).exp()
    *_, of_logprob = linear_logprob_module._linear_logprob_bwd_op(*rows, hidden, weight, targets, *sums, False)
    assert of_loss.numel() == of_logprob.numel() == 0


def on_frozen(op: Callable[..., Any], weight: Tensor, hidden: Tensor) -> Any:
    return op(hidden, weight.to(hidden.dtype))


@pytest.mark.parametrize("vocab", [39424, 151936])
def test_a_gibibyte_is_enough_for_8192_tokens(vocab: int) -> None:
    """Beside the results; cross-entropy takes the room of one weight gradient in fp32 besides."""
    shape = 8192, 4096, vocab
    assert held_by_cross_entropy(shape, BF16) <= 4 * 4096 * vocab + GIB
    assert max(held_by_logprob(shape, BF16)) <= GIB


def test_the_shapes_that_matter_are_cut_into_few_large_pieces() -> None:
    budget = vocabulary.WORKSPACE["cuda"]
    # All tokens are one group up to 2 d of them, and logits come in chunks of 1280 rows and more.
    assert token_groups(8192, 151936, 4096, BF16, budget) == (8192, 1280)
    assert token_groups(8192, 39424, 4096, BF16, budget)[0] == 8192
    assert token_groups(8193, 151936, 4096, BF16, budget)[0] > 8192
    columns, chunk = vocabulary_slices(8192, 151936, BF16, budget)
    assert len(vocabulary.runs(151936, columns)) == 5 and chunk >= 2048
