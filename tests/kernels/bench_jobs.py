"""Small jobs for the tests of the benchmark, and a clock that stands still unless work moves it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels.bench import clock, measure, run
from kernels.bench.ceilings import Ceilings
from kernels.bench.clock import CpuClock
from kernels.bench.host import measure_host
from kernels.bench.results import Findings
from kernels.bench.rowwise import row_check
from kernels.bench.run import Sizes, run_benchmark
from kernels.bench.workload import Contender, Inputs, Target, Work, Workload

CPU = torch.device("cpu")
FP32 = torch.float32
UNIT = Ceilings(copy=1e9, product=1e12)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(clock, "MOST_ROUNDS", 2)
    monkeypatch.setattr(measure, "ROUND_BYTES", 1 << 12)
    monkeypatch.setattr(measure, "MOST_SETS", 2)
    monkeypatch.setattr(run, "measure_host", partial(measure_host, calls=1, batches=1))


class Stopwatch:
    """A clock that stands still unless work moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def work(self, seconds: float) -> None:
        self.seconds += seconds


def doubling(contenders: list[Contender], dtype: torch.dtype = FP32, aims: tuple[Target, ...] = ()) -> Workload:
    """An op that doubles 64 numbers."""

    def make(seed: int) -> Inputs:
        x = torch.randn(64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return (x.requires_grad_(),)

    each = {"forward": Work(512), "backward": Work(512)}
    return Workload("double", "64", dtype, each, make, contenders, row_check(lambda x: 2 * x, (0,)), targets=aims)


def found(jobs: list[Workload], **options) -> Findings:
    lines: list[str] = []
    keywords = {"out": None, "seconds": 100.0, "say": lines.append, "sizes": Sizes((1 << 12,), (16,))} | options
    return run_benchmark(jobs, CpuClock(), CPU, {"device": "NVIDIA Test", "date": "today"}, **keywords)
