"""Time every op against its plain-torch reference, forward and backward, on the device at hand.

    make bench-kernels
    python tools/bench_kernels.py --tokens 4096 --hidden 1024

Both are timed in the same run, in turn, and the ratio of the medians is what counts: absolute times vary with the
machine. On a CPU the dtype is fp32, on a GPU bf16.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from engine.launch import run
from kernels.attention import attention
from kernels.attention.reference import attention_reference
from kernels.cross_entropy import cross_entropy, cross_entropy_reference
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rotary import rotary, rotary_reference
from kernels.swiglu import swiglu, swiglu_reference


@dataclass
class BenchConfig:
    """Time every op against its reference."""

    tokens: int = 1024
    """rows of every op; attention sees them as four documents"""
    hidden: int = 512
    """model width; heads are 64 wide, the feed-forward 2.75 times as wide"""
    vocab_size: int = 8192
    """columns of the head"""
    rounds: int = 7
    """measurements of each; the median is shown"""


@dataclass(frozen=True)
class Case:
    """One op and its reference on the same arguments; gradients are taken of the floating tensors among them."""

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]


def cases(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    T, d, V = config.tokens, config.hidden, config.vocab_size
    H, F = max(1, d // 64), int(2.75 * d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    x, weight = normal(T, d), normal(d)
    yield Case("rms_norm", rms_norm, rms_norm_reference, (x, weight, 1e-6))
    yield Case("add_rms_norm", add_rms_norm, add_rms_norm_reference, (x, normal(T, d), weight, 1e-6))
    positions = torch.arange(T, device=device) % (T // 4)
    angles = torch.rand(T, 32, device=device)
    yield Case("rotary", rotary, rotary_reference, (normal(T, H, 64), normal(T, H, 64), positions, angles, angles))
    yield Case("swiglu", swiglu, swiglu_reference, (normal(T, 2 * F),))
    bounds = torch.arange(0, T + 1, T // 4, dtype=torch.int32, device=device)
    qkv = (normal(T, H, 64), normal(T, H, 64), normal(T, H, 64))
    plain = partial(attention_reference, scale=0.125, window=None)
    bounded = partial(attention, max_q=T // 4, max_k=T // 4)
    yield Case("attention", bounded, plain, (*qkv, bounds, bounds))
    targets = torch.randint(0, V, (T,), device=device)
    yield Case("cross_entropy", cross_entropy, cross_entropy_reference, (normal(T, V), targets))
    head = normal(V, d)
    yield Case("linear_cross_entropy", linear_cross_entropy, linear_cross_entropy_reference, (x, head, targets))
    op, reference = (partial(f, with_entropy=True) for f in (linear_logprob, linear_logprob_reference))
    yield Case("linear_logprob", op, reference, (x, head, targets))


def milliseconds(function: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device) -> tuple[float, float]:
    """One forward and one backward."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for argument in arguments:
        if isinstance(argument, Tensor):
            argument.grad = None
    begin = now()
    result = function(*arguments)
    middle = now()
    outputs = [out for out in (result if isinstance(result, tuple) else (result,)) if out is not None]
    torch.autograd.backward([out.sum() for out in outputs if out.requires_grad])
    return 1e3 * (middle - begin), 1e3 * (now() - middle)


def main(config: BenchConfig) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {dtype}, {config.tokens} tokens, width {config.hidden}")
    print(f"{'op':<22}{'forward ms':>12}{'backward ms':>13}{'reference':>12}{'':>12}{'times as fast':>15}")
    for case in cases(config, device, dtype):
        ours, theirs = [], []
        for _ in range(config.rounds + 1):
            ours.append(milliseconds(case.op, case.arguments, device))
            theirs.append(milliseconds(case.reference, case.arguments, device))
        (f, b), (rf, rb) = (
            [statistics.median(side) for side in zip(*times[1:], strict=True)] for times in (ours, theirs)
        )
        print(f"{case.name:<22}{f:>12.3f}{b:>13.3f}{rf:>12.3f}{rb:>12.3f}{(rf + rb) / (f + b):>15.2f}", flush=True)


if __name__ == "__main__":
    run(main, BenchConfig)
