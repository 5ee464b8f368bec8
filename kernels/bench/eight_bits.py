"""Workloads of the linear layer in 8 bits, beside the same layer in 16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import targets, work
from kernels.bench.rowwise import Random
from kernels.bench.workload import OURS, Contender, Inputs, Outcome, Workload
from kernels.fp8_linear import fp8_linear, fp8_linear_reference

SIXTEEN_BITS = "the linear in 16 bits"


def fp8_linear_workload(tokens: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> Workload:
    """Casts of all operands included, as in a step of one micro-batch."""

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        return random.normal(tokens, width), random.normal(out, width, scale=width**-0.5)

    # By arithmetic, products in half the time and casts at the speed of copies, on an H200: 0.59 to 0.61.
    return Workload(
        "fp8_linear",
        f"{tokens}x{width} to {out}",
        dtype,
        work.fp8_linear_work(tokens, width, out, dtype.itemsize),
        make,
        [Contender(OURS, fp8_linear, "ours"), Contender(SIXTEEN_BITS, F.linear, "bound")],
        _check,
        targets=[targets.times("both", SIXTEEN_BITS, 0.65)],
    )


def _check(inputs: Inputs, upstream: list[Tensor], outcome: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Against the reference in fp32, all rows at once: they share a scale."""
    (y,), gradients = outcome
    x, weight = (t.detach().float().requires_grad_() for t in inputs)
    with torch.enable_grad():
        expected = fp8_linear_reference(x, weight, None)
    yield "the result", y, expected.detach()
    if gradients:
        for name, found, gradient in zip(
            ("x", "weight"), gradients, torch.autograd.grad(expected, (x, weight), upstream[0].float()), strict=True
        ):
            yield f"the gradient of {name}", found, gradient
