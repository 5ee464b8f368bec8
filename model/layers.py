"""The layers of a block: thin modules over the kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.linear import linear
from kernels.rms_norm import add_rms_norm, rms_norm


class Linear(nn.Module):
    """y = x weight^T + bias. Every matrix of a block goes through here, so a low-rank term has one place to enter."""

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return linear(x, self.weight, self.bias)


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
