"""Host time of a call beyond its launches: kernels are not started, everything around them is done.

The same on any machine with a processor; absolute figures are that processor's. A backward runs inside torch's
autograd, whose own share is what an empty function costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.adamw import adamw
from kernels.attention import attention
from kernels.attention.decode import decode_attention
from kernels.backend import Chip, observed_launches
from kernels.bench.attending import bounds
from kernels.bench.updating import ADAMW
from kernels.cross_entropy import cross_entropy
from kernels.grad_norm import grad_norm
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary, split_rotary
from kernels.sample import sample
from kernels.swiglu import swiglu

BUDGET = 15.0  # microseconds a call
CALLS, BATCHES = 50, 20


@dataclass(frozen=True)
class HostRow:
    """Microseconds a call: the forward without and with autograd, and the backward, where there is one."""

    op: str
    launches: int
    inference: float
    forward: float | None = None
    backward: float | None = None

    @property
    def is_met(self) -> bool:
        return max(self.inference, self.forward or 0.0) <= BUDGET


class _Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.empty_like(grads[0])


def measure_host(
    device: torch.device, now: Callable[[], float] = time.perf_counter, calls: int = CALLS, batches: int = BATCHES
) -> list[HostRow]:
    """A row for every op of a layer, at sizes that cost nothing, and one for an empty function."""
    real = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    chip = Chip(90, 132) if real is None else Chip(10 * real.major + real.minor, real.multi_processor_count)
    rows = []
    for name, call, inputs in _calls(device):
        launched: list[str] = []
        with observed_launches(lambda kernel, *_, seen=launched: seen.append(kernel), chip):  # type: ignore[misc]
            rows.append(_measure(name, call, inputs, launched, partial(_time_of, now, calls, batches)))
    return rows


def _calls(device: torch.device) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    def numbers(*shape: int, has_grad: bool = True) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=has_grad)

    x, weight = numbers(4, 64), numbers(64)
    heads = numbers(4, 2, 64), numbers(4, 2, 64)
    table = torch.rand(4, 32, device=device)
    lengths = torch.full((4,), 4, dtype=torch.int32, device=device)
    spans = bounds([4], device)
    integers = torch.arange(4, device=device)
    cache = numbers(4, 4, 2, 64, has_grad=False)
    yield "an empty function", _Empty.apply, (x,)
    yield "rms_norm", rms_norm, (x, weight, 1e-6)
    yield "add_rms_norm", add_rms_norm, (x, numbers(4, 64), weight, 1e-6)
    yield "rotary", rotary, (*heads, integers, table, table)
    yield "split_rotary", split_rotary, (numbers(4, 6, 64), 2, 2, integers, table, table)
    yield "swiglu", swiglu, (numbers(4, 128),)
    yield "attention", attention, (*heads, numbers(4, 2, 64), spans, spans, 4, 4)
    yield "decode_attention", decode_attention, (numbers(4, 2, 64, has_grad=False), cache, cache, lengths)
    yield "cross_entropy", cross_entropy, (numbers(4, 64), integers)
    tensors = [torch.randn(16, device=device) for _ in range(20)]
    scalars = {name: torch.ones((), device=device) for name in ("lr", "step", "clip_scale")}
    settings: dict[str, Any] = {**scalars, "should_skip": torch.zeros((), device=device), **ADAMW}
    yield "adamw, 20 tensors", lambda *lists: adamw(*lists, **settings), (tensors,) * 4
    yield "grad_norm, 20 tensors", grad_norm, (tensors,)
    yield "sample", sample, (numbers(4, 64, has_grad=False), 1.0, integers, integers)


def _measure(
    name: str,
    call: Callable[..., Any],
    inputs: tuple[Any, ...],
    launched: list[str],
    time_of: Callable[[Callable[[], Any]], float],
) -> HostRow:
    with torch.no_grad():
        call(*inputs)
        count = len(launched)
        inference = time_of(lambda: call(*inputs))
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return HostRow(name, count, inference)
    outputs = call(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [torch.zeros_like(x) for x in outputs]
    forward = time_of(lambda: call(*inputs))
    backward = time_of(lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True))
    return HostRow(name, count, inference, forward, backward)


def _time_of(now: Callable[[], float], calls: int, batches: int, run: Callable[[], Any]) -> float:
    """Microseconds a call."""
    run()
    readings = []
    for _ in range(batches):
        begin = now()
        for _ in range(calls):
            run()
        readings.append(1e6 * (now() - begin) / calls)
    return statistics.median(readings)
