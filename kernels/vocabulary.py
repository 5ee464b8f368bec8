"""What the ops on the language-model head share: which rows count, in which chunks, and products in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.backend import accumulation_dtype

IGNORE = -100

# Bytes of logits alive at a time. On a GPU few large chunks keep the matrix products efficient, for each chunk
# reads and writes the whole gradient of the head. On a CPU a smaller buffer stays nearer to the caches.
WORKSPACE = {"cuda": 512 << 20, "cpu": 64 << 20}


def counted_rows(targets: Tensor) -> Tensor | None:
    """int64 [N]: the rows whose target is not IGNORE, or None for all rows.

    On a CPU the rows that do not count are never computed. Elsewhere their number is known to the device
    alone, and waiting for it would cost more than they do.
    """
    if targets.device.type != "cpu":
        return None
    rows = (targets != IGNORE).nonzero().squeeze(1)
    return None if len(rows) == len(targets) else rows


def chunks(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Iterator[slice]:
    """Equal runs of rows whose logits fit the workspace."""
    budget = WORKSPACE.get(device.type, WORKSPACE["cpu"])
    largest = max(1, budget // (vocabulary * accumulation_dtype(dtype).itemsize))
    count = -(-rows // largest)
    for index in range(count):
        yield slice(rows * index // count, rows * (index + 1) // count)


class WideProducts:
    """Matrix products of narrow tensors with wide (fp32, fp64) sums and results.

    A GPU multiplies narrow operands into wide results. A CPU would round the result, so there the weight is
    widened once and every product is wide.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.dtype = accumulation_dtype(hidden.dtype)
        self.is_mixed = hidden.device.type == "cuda" and hidden.dtype != self.dtype
        self.narrow = hidden.dtype
        self.weight = weight if self.is_mixed else weight.to(self.dtype)

    def _operand(self, x: Tensor) -> Tensor:
        return x.to(self.narrow) if self.is_mixed else x.to(self.dtype)

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """out <- a b"""
        kind = {"out_dtype": self.dtype} if self.is_mixed else {}
        return torch.mm(self._operand(a), self._operand(b), out=out, **kind)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """total <- total + a b"""
        kind = {"out_dtype": self.dtype} if self.is_mixed else {}
        return torch.addmm(total, self._operand(a), self._operand(b), out=total, **kind)


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight is {weight.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} for hidden {tuple(hidden.shape)}")
