"""Workloads of the rotary embedding: of queries and keys, and out of the fused projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.bench import peers, targets, work
from kernels.bench.rowwise import Random, row_check
from kernels.bench.workload import OURS, Contender, Inputs, Workload
from kernels.rotary import rotary, rotary_reference, split_rotary, split_rotary_reference


def rotary_workload(
    tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_split: bool = False,
    compiled: bool = False,
) -> Workload:
    """Positions run through two documents. is_split: queries, keys and values are taken out of their product."""
    longest = tokens // 2
    shapes = [(tokens, heads + 2 * kv_heads, width)] if is_split else [(tokens, n, width) for n in (heads, kv_heads)]

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        positions = torch.arange(tokens, device=device) % longest
        return *(random.normal(*shape) for shape in shapes), positions, *rotary_tables(longest, width, device)

    def of_split(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda qkv, *tables: op(qkv, heads, kv_heads, *tables)

    ours, reference = (
        (of_split(split_rotary), of_split(split_rotary_reference)) if is_split else (rotary, rotary_reference)
    )
    contenders = [Contender(OURS, ours, "ours"), Contender("eager", reference)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(reference)))
    liger = peers.liger("rope", "LigerRopeFunction")
    if liger is not None:

        def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            heads_first = (x.unsqueeze(0).transpose(1, 2) for x in (q, k))
            return tuple(x.transpose(1, 2).squeeze(0) for x in liger.apply(*heads_first, cos, sin))

        def split_and_turn(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
            return *turn(q, k, cos, sin), v

        # Its tables hold a row for each token and both halves of a head; it turns q and k in place.
        def adapt(inputs: Inputs) -> Inputs:
            *arrays, positions, cos, sin = inputs
            arrays = [x.detach().clone().requires_grad_() for x in arrays]
            return *arrays, *(table[positions].repeat(1, 2).unsqueeze(0).to(dtype) for table in (cos, sin))

        contenders.append(Contender("liger", split_and_turn if is_split else turn, adapt=adapt, spoils=True))
    counted = heads + (2 if is_split else 1) * kv_heads
    return Workload(
        "split_rotary" if is_split else "rotary",
        f"{tokens}x({heads}+{kv_heads}{f'+{kv_heads}' if is_split else ''})x{width}",
        dtype,
        work.rotary_work(tokens, counted, width, longest, dtype.itemsize),
        make,
        contenders,
        row_check(reference, tuple(range(len(shapes) + 1))),
        targets=[targets.percent("forward", 85), targets.percent("backward", 85)],
    )


def rotary_tables(positions: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, width / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angles = torch.arange(positions, device=device).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()
