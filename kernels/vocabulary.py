"""What the ops on the language-model head share: which rows count, in which chunks, and products in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype
from kernels.linear import matmul_nt

# A target that is none: it adds nothing to a loss and has no gradient.
IGNORE = -100

# Bytes of the logits of one chunk and of their gradient. Few large chunks: each reads a whole matrix again. A CPU
# gains nothing from buffers far beyond its caches.
WORKSPACE = {"cuda": 768 << 20, "cpu": 16 << 20}
# Rows and columns of one tile of a matrix product, or a multiple: products of whole tiles waste nothing.
TILE = 128


def workspace(device: torch.device) -> int:
    return WORKSPACE.get(device.type, WORKSPACE["cuda"])


def most(budget: int, unit: int) -> int:
    """How many units fit a budget: whole tiles of them where they can be, and at least one."""
    count = max(1, budget // unit)
    return count // TILE * TILE or count


def runs(length: int, largest: int) -> list[slice]:
    """Runs of at most `largest`, equal up to a tile. Of nothing there is one, empty: sums over it are still formed."""
    if length == 0:
        return [slice(0, 0)]
    equal = -(-length // -(-length // largest))
    step = min(largest, -(-equal // TILE) * TILE)
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def counted_rows(targets: Tensor) -> Tensor | None:
    """int64 [N]: the rows whose target is not IGNORE, or None for all rows.

    On a CPU the rows that do not count are never computed. Elsewhere their number is known to the device
    alone, and waiting for it would cost more than they do.
    """
    if targets.device.type != "cpu":
        return None
    rows = (targets != IGNORE).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def pick(rows: Tensor | None, *tensors: Any) -> tuple[Any, ...]:
    """The counted rows of tensors, or of None."""
    return tensors if rows is None else tuple(None if x is None else x[rows] for x in tensors)


def put_back(rows: Tensor | None, picked: Tensor, like: Tensor) -> Tensor:
    """Rows at their old places, zeros elsewhere."""
    return picked if rows is None else picked.new_zeros(like.shape).index_copy_(0, rows, picked)


def chunks(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Runs of rows whose logits fit the workspace."""
    return runs(rows, most(workspace(device), vocabulary * accumulation_dtype(dtype).itemsize))


def buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns], uninitialised. Its rows begin at multiples of 128 bytes, as fast products need them to."""
    return torch.empty(rows, padded(columns), dtype=dtype, device=device)[:, :columns]


def padded(columns: int) -> int:
    return -(-columns // 64) * 64


def without_ignored(hidden: Tensor, targets: Tensor) -> Tensor:
    """hidden with rows of zeros where there is no target: in a sum over rows, 0 times NaN would be NaN."""
    return hidden.masked_fill((targets == IGNORE).unsqueeze(1), 0)


def log_softmax_(x: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits [n, V] into log-probabilities, in place; return each row's peak and log sum exp(x - peak).

    The latter is read off the largest entry, where the difference of the two loses the least.
    """
    peak = x.amax(dim=-1)
    torch.log_softmax(x, dim=-1, out=x)
    return peak, -x.amax(dim=-1)


class HeadProducts:
    """The three matrix products of a head, with sums and results in fp32 (fp64 for fp64).

    A GPU multiplies narrow operands into wide results. A CPU would round the result, so there narrow operands
    are widened, the weight once for all chunks.
    """

    def __init__(self, weight: Tensor) -> None:
        self.wide = accumulation_dtype(weight.dtype)
        self.is_mixed = weight.device.type == "cuda" and weight.dtype != self.wide
        self.weight = weight if self.is_mixed else weight.to(self.wide)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d] -> [n, V]"""
        return self._product(hidden, self.weight)

    def dhidden(self, dlogits: Tensor) -> Tensor:
        """[n, V] -> [n, d]"""
        return self._product(dlogits, self.weight.t())

    def add_dweight(self, total: Tensor | None, dlogits: Tensor, hidden: Tensor) -> Tensor:
        """total + dlogits^T hidden, [V, d], in place where there is a total."""
        product = self._product(dlogits.t(), hidden.t())
        return product if total is None else total.add_(product)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T"""
        if self.is_mixed:
            narrow = self.weight.dtype
            return torch.mm(a.to(narrow), b.to(narrow).t(), out_dtype=self.wide)
        return matmul_nt(a.to(self.wide), b.to(self.wide))


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
