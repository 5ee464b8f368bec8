"""Inputs for the ops on a language-model head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.vocabulary import IGNORE
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random


def head(tokens: int, width: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and weight."""
    return random(tokens, width, dtype=dtype), random(vocab, width, seed=1, dtype=dtype)


def labels(tokens: int, vocab: int, ignored: float = 0.3) -> Tensor:
    """Targets; the last one is the last of the vocabulary."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[-1:] = vocab - 1
    return targets.where(torch.rand(tokens, generator=generator) >= ignored, IGNORE).to(DEVICE)


def loss_and_reference(**keywords: object) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`linear_cross_entropy` and its reference, each as the one sum that has a gradient."""
    return (
        lambda *args: sum(linear_cross_entropy(*args, **keywords)),
        lambda *args: sum(linear_cross_entropy_reference(*args, **keywords)),
    )
