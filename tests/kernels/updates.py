"""Lists for AdamW: tensors of all kinds of sizes, and the settings they are updated with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.masters import split_master
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

SHAPES = [(5, 7), (1023,), (1,), (0, 4), (1024,), (25, 41), (), (16411,)]
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
DECAYS = [0.1, 0.0, 0.3, 0.1, 0.0, 0.1, 0.0, 0.2]
OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": DECAYS}
# A power of two is one number in float64 and in fp32.
LR = 2.0**-7


def state(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs; parameters so small that a few steps change them by their own size."""
    lists = [[random(*shape, seed=10 * k + i) for i, shape in enumerate(SHAPES)] for k in range(4)]
    lists[0] = [0.02 * x for x in lists[0]]
    lists[3] = [x.square() for x in lists[3]]
    return [[x.to(dtype) for x in tensors] for tensors in lists]


def shadows_of(params: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(param, dtype=torch.bfloat16) for param in params]


def halves_of(masters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    weights, remainders = zip(*map(split_master, masters), strict=True)
    return list(weights), list(remainders)


def scalars(step: float = 3, clip_scale: float = 0.375, should_skip: float = 0) -> dict[str, Tensor]:
    given = {"lr": LR, "step": step, "clip_scale": clip_scale, "should_skip": should_skip}
    return {name: torch.tensor(value, device=DEVICE) for name, value in given.items()}


def copies(*lists: list[Tensor]) -> list[list[Tensor]]:
    return [[x.clone() for x in tensors] for tensors in lists]


def cut(flat: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views, most of which begin where no access of 16 bytes may."""
    return list(flat.split(sizes))


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True) if a.ndim)
