"""Decoding over whole pages on a processor, against the reference that takes the rows one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention.decode import decode_attention_reference
from kernels.attention.decode_pages import PagesInSight, decode_pages

PAGE = 16
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def cache(pages: int, kv_heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, pages, kv_heads, PAGE, width, generator=generator, dtype=dtype)
    return k, v


def assert_faithful(
    lengths: list[int],
    table: list[list[int]],
    window: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> PagesInSight:
    width = 24
    k, v = cache(40, kv_heads, width, dtype)
    q = torch.randn(len(lengths), heads, width, generator=torch.Generator().manual_seed(1), dtype=dtype)
    columns = max(map(len, table))
    tables = torch.tensor([row + [-1] * (columns - len(row)) for row in table], dtype=torch.int32)
    bounds = torch.tensor(lengths, dtype=torch.int32)
    sight = PagesInSight.of(bounds, tables, PAGE, window)
    out = decode_pages(q, k, v, sight, scale=0.3)
    paged = k.transpose(1, 2), v.transpose(1, 2)
    expected = decode_attention_reference(q, *paged, bounds, scale=0.3, window=window, block_table=tables)
    assert out.dtype == dtype and (out - expected).abs().max() <= TOLERANCE[dtype]
    return sight


RAGGED = [1, PAGE, PAGE + 1, 3 * PAGE - 2]
SCATTERED = [[7], [3], [4, 1], [2, 6, 5]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 1, PAGE, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_rows_of_any_length_attend_to_their_pages(
    heads: int, kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    assert_faithful(RAGGED, SCATTERED, window, heads, kv_heads, dtype)


def test_pages_side_by_side_are_read_where_they_lie() -> None:
    (reading,) = assert_faithful(RAGGED, SCATTERED).readings
    assert reading.select == slice(1, 8)


def test_a_few_pages_of_nobody_between_them_are_read_too_and_count_nothing() -> None:
    (reading,) = assert_faithful([40, 20], [[9, 12, 10], [15, 14]]).readings
    assert reading.select == slice(9, 16)


def test_pages_far_apart_are_taken_out() -> None:
    (reading,) = assert_faithful([40, 20], [[1, 30, 12], [39, 14]]).readings
    assert isinstance(reading.select, Tensor)


@pytest.mark.parametrize("window", [None, PAGE, 20])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_shared_pages_are_read_once_more_for_all_of_their_other_owners(
    heads: int, kv_heads: int, window: int | None
) -> None:
    lengths, table = [2 * PAGE + 3, 2 * PAGE + 9, PAGE + 1], [[1, 2, 3], [1, 2, 4], [1, 5]]
    assert_faithful(lengths, table, window, heads, kv_heads)
    every, shared = assert_faithful(lengths, table, None, heads, kv_heads).readings
    assert (every.select, shared.select) == (slice(1, 6), slice(1, 3))
    assert every.owner.tolist() == [[0], [0], [0], [1], [2]]
    assert shared.owner.shape == (2, 2) and shared.owner[0].tolist() == [1, 2]


def test_shared_pages_far_apart_are_taken_out() -> None:
    _, shared = assert_faithful([2 * PAGE + 3, 2 * PAGE + 9], [[1, 30, 3], [1, 30, 4]]).readings
    assert isinstance(shared.select, Tensor)


def test_pages_before_a_window_are_not_read() -> None:
    for window, pages in ((PAGE, 1), (PAGE + 1, 2)):
        (reading,) = assert_faithful([3 * PAGE], [[1, 2, 3]], window=window).readings
        assert len(reading.owner) == pages


def test_what_lies_beyond_a_row_s_length_counts_nothing() -> None:
    sight = PagesInSight.of(torch.tensor([5], dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32), PAGE, None)
    k, v = cache(2, 1, 8, torch.float32)
    q = torch.ones(1, 2, 8)
    before = decode_pages(q, k, v, sight)
    for x in (k, v):
        x[1, :, 5:] = 1e30
    assert torch.equal(decode_pages(q, k, v, sight), before)


def test_large_scores_do_not_overflow() -> None:
    k, v = cache(3, 1, 8, torch.float32)
    q = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2)) * 1e4
    lengths, table = torch.tensor([2 * PAGE], dtype=torch.int32), torch.tensor([[1, 2]], dtype=torch.int32)
    out = decode_pages(q, k, v, PagesInSight.of(lengths, table, PAGE, None))
    expected = decode_attention_reference(
        q, k.transpose(1, 2), v.transpose(1, 2), lengths, scale=8**-0.5, window=None, block_table=table
    )
    assert out.isfinite().all() and (out - expected).abs().max() <= 1e-5
