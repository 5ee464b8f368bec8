"""Workloads of the linear layer with adapters, beside the frozen layer alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import peers, targets, work
from kernels.bench.rowwise import Random, row_check
from kernels.bench.workload import OURS, Contender, Inputs, Workload
from kernels.low_rank import low_rank_linear, low_rank_linear_reference

SCALE = 2.0
FROZEN = "the frozen linear"


def low_rank_workload(
    tokens: int,
    width: int,
    sizes: Sequence[int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiled: bool = False,
) -> Workload:
    """sizes: outputs of the parts that are stacked in the weight, each of which has an adapter."""
    present = (True,) * len(sizes)

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        x, weight = random.normal(tokens, width), random.normal(sum(sizes), width, scale=width**-0.5, has_grad=False)
        a, b = random.normal(len(sizes) * rank, width, scale=width**-0.5), random.normal(sum(sizes), rank, scale=0.01)
        return x, weight, a, b

    def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linear(x, weight, None, a, b, SCALE, sizes)

    def reference(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return low_rank_linear_reference(x, weight, None, a, b, SCALE, sizes, present, None)

    def eager(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = F.linear(x, a).chunk(len(sizes), dim=1)
        terms = [u @ rows.t() for u, rows in zip(low, b.split(list(sizes)), strict=True)]
        return torch.add(F.linear(x, weight), torch.cat(terms, dim=1), alpha=SCALE)

    contenders = [Contender(OURS, ours, "ours"), Contender("eager", eager)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(eager)))
    contenders.append(Contender(FROZEN, F.linear, "bound", adapt=lambda inputs: inputs[:2]))
    return Workload(
        "low_rank_linear",
        f"{tokens}x{width}x{'+'.join(map(str, sizes))} rank {rank}",
        dtype,
        work.low_rank_work(tokens, width, sum(sizes), sizes, rank, dtype.itemsize),
        make,
        contenders,
        row_check(reference, (0,)),
        targets=[targets.times("both", FROZEN, 1.1)],
    )
