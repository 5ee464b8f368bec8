"""A frozen linear layer and, beside it, adapters.

    y_i = x W_i^T + bias_i + scale (x A_i^T) B_i^T     for each part i of the outputs      (Hu et al. 2021, section 4.1)

The weight gets no gradient, and none is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.linear import linear


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    sizes: Sequence[int],
    present: Sequence[bool] | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias, plus the product of each part's adapter.

    Args:
        x: [T, in], any float dtype.
        weight: [out, in], dtype of x, frozen.
        bias: [out] or None, frozen.
        a: [n r, in], the A of the n parts that have an adapter, stacked.
        b: [rows of those parts, r], their B, stacked.
        scale: of the products.
        sizes: rows of each part; their sum is out.
        present: which parts have an adapter; by default all.
        dropped: [T, in], what the adapters read instead of x.
    Returns:
        [T, out], dtype of x.
    """
    is_there = tuple(present or (True for _ in sizes))
    adapted = [size for size, there in zip(sizes, is_there, strict=True) if there]
    low = ((x if dropped is None else dropped) @ a.t()).chunk(len(adapted), dim=1)  # [T, r] each
    products = iter([scale * (of_part @ rows.t()) for of_part, rows in zip(low, b.split(adapted), strict=True)])
    dense = linear(x, weight.detach(), bias).split(list(sizes), dim=1)
    return torch.cat([y + next(products) if there else y for y, there in zip(dense, is_there, strict=True)], dim=1)
