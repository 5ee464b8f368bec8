"""Rows 2^30 numbers apart, so that the third begins beyond 2^31: an offset kept in 32 bits would miss it.

The memory is address space only, until it is written to: a few pages are. A row that is missed is read from before
the first one, where there are zeros.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels.attention import attention
from kernels.attention.decode import decode_attention
from kernels.cross_entropy import cross_entropy
from kernels.rms_norm import rms_norm
from kernels.rotary import rotary
from kernels.sample import sample
from tests.kernels.faces import DEVICE
from tests.kernels.oracle import random

APART = 2**30
ROWS = 3
_NORESERVE = 0x4000  # mmap.MAP_NORESERVE, from Python 3.13 on


def far_apart(x: Tensor) -> Tensor:
    """x, its rows APART numbers apart, with as much memory before it as behind."""
    numbers = 4 * APART + x[0].numel()
    if DEVICE == "cuda":
        memory = torch.zeros(numbers, dtype=x.dtype, device=DEVICE)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        try:
            memory = torch.frombuffer(mmap.mmap(-1, numbers * x.element_size(), flags=flags), dtype=x.dtype)
        except OSError as error:
            pytest.skip(f"this machine gives no address space beyond its memory: {error}")
    far = memory[2 * APART :].as_strided(x.shape, (APART, *x.stride()[1:]))
    far.copy_(x)
    return far


def results(op: Callable[..., Tensor | tuple[Tensor, ...]], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """What op returns, and its gradients where it has any."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = op(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    if not found[-1].requires_grad:
        return [y.detach() for y in found]
    upstream = [random(*y.shape, seed=9, dtype=y.dtype) for y in found]
    return [y.detach() for y in found] + list(torch.autograd.grad(found, leaves, upstream))


def _rotary(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    angles = random(ROWS, 16, seed=5)
    return rotary(q, k, torch.arange(ROWS, device=DEVICE), angles.cos(), angles.sin())


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bounds = torch.tensor([0, ROWS], dtype=torch.int32, device=DEVICE)
    return attention(q, k, v, bounds, bounds, ROWS, ROWS)


def _decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        return decode_attention(q, k, v, torch.full((ROWS,), 8, dtype=torch.int32, device=DEVICE))


def _sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    seeds = torch.arange(ROWS, device=DEVICE)
    return sample(logits, 1.0, seeds, seeds)


# Of each op: the shape of what has far rows, how many such tensors there are, and the call.
CALLS = {
    "rms_norm": ((2, 64), 1, lambda x: rms_norm(x, random(64, seed=1, dtype=x.dtype), 1e-6)),
    "rotary": ((2, 32), 2, _rotary),
    "cross_entropy": ((77,), 1, partial(cross_entropy, targets=torch.tensor([3, 76, 0], device=DEVICE))),
    "attention": ((2, 32), 3, _attention),
    "decode_attention": ((8, 2, 32), 2, _decode),
    "sample": ((77,), 1, _sample),
}


@pytest.mark.parametrize("face", ["triton"], indirect=True)
@pytest.mark.parametrize("op", CALLS)
def test_rows_beyond_32_bits_are_found(op: str, face: str) -> None:
    shape, count, call = CALLS[op]
    near = [random(ROWS, *shape, seed=seed, dtype=torch.float16) for seed in range(count)]
    far = [far_apart(x) for x in near]
    if op == "decode_attention":  # of its queries, keys and values only the latter are large
        q = random(ROWS, 2, 32, seed=8, dtype=torch.float16)
        near, far = [q, *near], [q, *far]
    for ours, expected in zip(results(call, tuple(far)), results(call, tuple(near)), strict=True):
        assert torch.equal(ours, expected)
