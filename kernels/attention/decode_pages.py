"""Decoding over a paged cache on a processor: all rows and pages in two batched products.

`decode_attention` takes the rows one by one there. Here every page is a small problem of its own, as the stretches of
the GPU's kernel are: its queries are those of the row that it belongs to, and the pages of a row are added up at the
end, under one maximum. Rows of any lengths waste nothing but the empty ends of their last pages.

    s_p = scale q_row(p) K_p^T + bias_p,    m_b = max over pages p of b,    l_b = sum_p sum exp(s_p - m_b)
    out_b = sum_p exp(s_p - m_b) V_p / l_b

Pages that lie side by side in the cache are read where they lie. What to read is the same for all layers of a step,
so it is worked out once, in `PagesInSight`. A page is multiplied whole: where no key was written it has to hold
finite numbers, which are then multiplied by 0.
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
class PagesInSight:
    """Which pages the rows of a step see, n of them.

    select: where in the cache they lie.
    owner: int64 [n], the row that reads each.
    bias: [n, 1, page], 0 where a key is seen and -inf elsewhere.
    rows: B.
    """

    select: slice | Tensor
    owner: Tensor
    bias: Tensor
    rows: int

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
        pages, order = block_table[owner, column].long().sort()
        owner, column = owner[order], column[order]
        key = (column * page).unsqueeze(1) + torch.arange(page)  # [n, page]
        bias = torch.zeros(key.shape, dtype=dtype)
        bias.masked_fill_((key >= end[owner]) | (key < begin[owner]), float("-inf"))
        low, high = int(pages[0]), int(pages[-1]) + 1
        if len(pages) < DENSE * (high - low) or not bool((pages.diff() > 0).all()):
            return cls(pages, owner, bias.unsqueeze(1), len(lengths))
        place = pages - low
        owner = torch.zeros(high - low, dtype=torch.int64).index_copy_(0, place, owner)
        bias = torch.full((high - low, page), float("-inf"), dtype=dtype).index_copy_(0, place, bias)
        return cls(slice(low, high), owner, bias.unsqueeze(1), len(lengths))


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
    (rows, heads, width), (kv_heads, page) = q.shape, k_pages.shape[1:3]
    wide = accumulation_dtype(q.dtype)
    k, v = (pages[sight.select].to(wide).reshape(-1, page, width) for pages in (k_pages, v_pages))  # [nK, page, h]
    owner, groups = sight.owner, heads // kv_heads
    q = q.to(wide) * (width**-0.5 if scale is None else scale)
    scores = torch.bmm(q[owner].view(-1, groups, width), k.transpose(1, 2)).view(-1, heads, page)
    scores += sight.bias
    to_row = owner.unsqueeze(1).expand(-1, heads)
    top = scores.new_full((rows, heads), float("-inf")).scatter_reduce_(0, to_row, scores.amax(dim=2), "amax")
    weights = scores.sub_(top[owner].unsqueeze(2)).exp_()
    total = scores.new_zeros((rows, heads)).index_add_(0, owner, weights.sum(dim=2))
    parts = torch.bmm(weights.view(-1, groups, page), v).view(-1, heads, width)
    out = scores.new_zeros((rows, heads, width)).index_add_(0, owner, parts)
    return out.div_(total.unsqueeze(2)).to(k_pages.dtype)
