"""The layers of a block: thin modules over the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.dropout import dropout
from kernels.fp8_linear import fp8_linear
from kernels.linear import linear
from kernels.low_rank import low_rank_linear
from kernels.rms_norm import add_rms_norm, rms_norm


@dataclass
class LowRank:
    """What a low-rank term is, beside its matrices.

    sizes: rows of each projection that is stacked in the weight.
    present: which of them have an adapter.
    scale: of the product.
    dropout: share of the inputs that the adapters do not see where gradients are computed.
    seed: of the dropout of this forward pass: int64 scalar, on the CPU.
    is_on: whether the term is added, or one of zeros instead.
    """

    sizes: tuple[int, ...]
    present: tuple[bool, ...]
    scale: float
    dropout: float = 0.0
    seed: Tensor | None = None
    is_on: bool = True


class Linear(nn.Module):
    """y = x weight^T + bias, and where there are adapters scale (x A^T) B^T for each projection stacked in the weight.

    lora_a: [n r, in], the A of the n projections that have an adapter, stacked.
    lora_b: [rows of those projections, r], their B, stacked.
    """

    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.low_rank: LowRank | None = None
        self.is_fp8 = False  # whether the product is one of 8-bit numbers

    def add_low_rank(self, rank: int, term: LowRank) -> None:
        """Add adapters of this rank, empty, in the weight's dtype and on its device."""
        rows = sum(size for size, is_present in zip(term.sizes, term.present, strict=True) if is_present)
        self.lora_a = nn.Parameter(self.weight.new_empty(sum(term.present) * rank, self.weight.shape[1]))
        self.lora_b = nn.Parameter(self.weight.new_empty(rows, rank))
        self.low_rank = term

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        term = self.low_rank
        if term is None:
            return (fp8_linear if self.is_fp8 else linear)(x, self.weight, self.bias)
        dropped = None
        if term.is_on and term.dropout > 0 and torch.is_grad_enabled():
            assert term.seed is not None
            dropped = dropout(x, term.dropout, term.seed)
        return low_rank_linear(
            x,
            self.weight,
            self.bias,
            self.lora_a,
            self.lora_b,
            # The same products on or off: another one may round differently, and fresh adapters must change nothing.
            term.scale if term.is_on else 0.0,
            term.sizes,
            present=term.present,
            dropped=dropped,
        )


class Embedding(nn.Module):
    """The input embedding, and the head's matrix too when they are tied."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [T] -> [T, d]"""
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., N]"""
        return rms_norm(x, self.weight, self.eps)

    def after_add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), in one pass."""
        return add_rms_norm(x, residual, self.weight, self.eps)
