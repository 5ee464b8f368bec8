"""Decoding over a paged cache on a processor: all rows and pages in a few batched products.

`decode_attention` takes the rows one by one there. Here every page is a small problem of its own, as the stretches of
the GPU's kernel are: its queries are those of the rows that it belongs to, and the pages of a row are added up at the
end, under one maximum. Rows of any lengths waste nothing but the empty ends of their last pages.

    s_p = scale q_row(p) K_p^T + bias_p,    m_b = max over pages p of b,    l_b = sum_p sum exp(s_p - m_b)
    out_b = sum_p exp(s_p - m_b) V_p / l_b

Pages that lie side by side in the cache are read where they lie, each for its first owner. Where several rows share
pages, as the answers to one prompt do, these are read once more for all of their other owners together. What to read
is the same for all layers of a step, so it is worked out once, in `PagesInSight`. A page is multiplied whole: where no
key was written it has to hold finite numbers, which are then multiplied by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype

# A batch of pages is taken out of the cache when it is less than this share of those from its first to its last:
# a copy costs about as much as reading twice.
DENSE = 0.5


@dataclass(frozen=True)
class Reading:
    """n pages, each read for m rows.

    select: where in the cache they lie.
    owner: int64 [n, m], the rows that read each.
    bias: [n, m, page], 0 where a row sees a key and -inf elsewhere.
    """

    select: slice | Tensor
    owner: Tensor
    bias: Tensor

    @classmethod
    def of(cls, pages: Tensor, owner: Tensor, bias: Tensor) -> Reading:
        """In place where that is worth it. pages: int64 [n], ascending."""
        low, high = int(pages[0]), int(pages[-1]) + 1
        if len(pages) < DENSE * (high - low):
            return cls(pages, owner, bias)
        place = pages - low
        everywhere = owner.new_zeros(high - low, owner.shape[1]).index_copy_(0, place, owner)
        hidden = bias.new_full((high - low, *bias.shape[1:]), float("-inf")).index_copy_(0, place, bias)
        return cls(slice(low, high), everywhere, hidden)


@dataclass(frozen=True)
class PagesInSight:
    """Which pages the rows of a step see: all of them once, and shared ones once more for their other owners."""

    readings: tuple[Reading, ...]

    @classmethod
    def of(
        cls, lengths: Tensor, block_table: Tensor, page: int, window: int | None, dtype: torch.dtype = torch.float32
    ) -> PagesInSight:
        """
        Args:
            lengths: int32 [B], keys in the cache, at least 1.
            block_table: int32 [B, W].
            window: keys that a query sees, its own included.
            dtype: of the bias.
        """
        end = lengths.long().unsqueeze(1)  # [B, 1]
        begin = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
        first = torch.arange(0, block_table.shape[1] * page, page)
        owner, column = ((first < end) & (first + page > begin)).nonzero(as_tuple=True)
        pages, order = block_table[owner, column].long().sort(stable=True)
        owner, column = owner[order], column[order]
        key = (column * page).unsqueeze(1) + torch.arange(page)  # of each page and owner, [N, page]
        bias = torch.zeros(key.shape, dtype=dtype)
        bias.masked_fill_((key >= end[owner]) | (key < begin[owner]), float("-inf"))
        distinct, number, owners = pages.unique_consecutive(return_inverse=True, return_counts=True)
        start = owners.cumsum(0) - owners
        readings = [Reading.of(distinct, owner[start].unsqueeze(1), bias[start].unsqueeze(1))]
        if len(distinct) < len(pages):
            shared = (owners > 1).nonzero().squeeze(1)
            others = int(owners.max()) - 1
            row = torch.zeros(len(distinct), others, dtype=torch.int64)
            seen = torch.full((len(distinct), others, page), float("-inf"), dtype=dtype)
            rank = torch.arange(len(pages)) - start[number] - 1  # among the owners behind the first
            is_other = rank >= 0
            at = number[is_other], rank[is_other]
            row[at], seen[at] = owner[is_other], bias[is_other]
            readings.append(Reading.of(distinct[shared], row[shared], seen[shared]))
        return cls(tuple(readings))


def decode_pages(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, sight: PagesInSight, *, scale: float | None = None
) -> Tensor:
    """Attention of one query a row to the pages in its sight; without gradients.

    Args:
        q: [B, H, h].
        k_pages, v_pages: [pages, K, page, h], dtype of q; K divides H. All numbers finite.
        scale: of the scores; 1/sqrt(h) when None.
    Returns:
        [B, H, h], dtype of q.
    """
    (rows, heads, width), kv_heads = q.shape, k_pages.shape[1]
    wide = accumulation_dtype(q.dtype)
    q = q.to(wide) * (width**-0.5 if scale is None else scale)

    def times(x: Tensor, reading: Reading, pages: Tensor, is_key: bool) -> Tensor:
        """[n m, H, -] times each page's keys, transposed, or values: [n m, H, -]."""
        taken = pages[reading.select].to(wide).flatten(0, 1)  # [nK, page, h]
        x = _by_page(x, reading.owner.shape, kv_heads)
        return _by_row(torch.bmm(x, taken.transpose(1, 2) if is_key else taken), reading.owner.shape, heads)

    each = [times(q[one.owner.flatten()], one, k_pages, is_key=True) for one in sight.readings]
    for own, one in zip(each, sight.readings, strict=True):
        own += one.bias.flatten(0, 1).unsqueeze(1)
    scores = each[0] if len(each) == 1 else torch.cat(each)  # [N, H, page]
    owner = torch.cat([one.owner.flatten() for one in sight.readings])
    to_row = owner.unsqueeze(1).expand(-1, heads)
    top = scores.new_full((rows, heads), float("-inf")).scatter_reduce_(0, to_row, scores.amax(dim=2), "amax")
    weights = scores.sub_(top[owner].unsqueeze(2)).exp_()
    total = scores.new_zeros((rows, heads)).index_add_(0, owner, weights.sum(dim=2))
    out = scores.new_zeros((rows, heads, width))
    of_readings = weights.split([one.owner.numel() for one in sight.readings])
    for one, own in zip(sight.readings, of_readings, strict=True):
        out.index_add_(0, one.owner.flatten(), times(own, one, v_pages, is_key=False))
    return out.div_(total.unsqueeze(2)).to(k_pages.dtype)


def _by_page(x: Tensor, owners: torch.Size, kv_heads: int) -> Tensor:
    """[n m, H, -] to [n K, m H / K, -]: a page's queries, of all of its owners, by its heads."""
    (n, m), last = owners, x.shape[-1]
    return x.view(n, m, kv_heads, -1, last).transpose(1, 2).reshape(n * kv_heads, -1, last)


def _by_row(x: Tensor, owners: torch.Size, heads: int) -> Tensor:
    """Back again."""
    (n, m), last = owners, x.shape[-1]
    kv_heads = len(x) // n
    return x.view(n, kv_heads, m, -1, last).transpose(1, 2).reshape(n * m, heads, last)
