"""The benchmark's clock on a GPU: it times the device and not the host, and counts memory to the byte."""

from __future__ import annotations

import time

import pytest
import torch

from kernels.bench import clock
from kernels.bench.ceilings import measure_ceilings
from kernels.bench.clock import CudaClock, Round, race
from kernels.bench.machine import machine
from kernels.bench.measure import measure
from kernels.bench.rowwise import norm_workload
from kernels.bench.workload import OURS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LEAST_ROUNDS", 5)
    monkeypatch.setattr(clock, "MOST_ROUNDS", 5)


def test_a_slow_host_is_not_timed() -> None:
    x = torch.zeros(1024, device="cuda")

    def run() -> None:
        time.sleep(0.003)
        x.add_(1)

    assert race(CudaClock(), {"it": Round(run, 1)})["it"].median < 0.5


def test_the_clock_agrees_with_the_wall() -> None:
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    timing = CudaClock()
    median = race(timing, {"it": Round(lambda: torch.mm(a, a), 1)})["it"].median
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(50):
        torch.mm(a, a)
    torch.cuda.synchronize()
    assert median == pytest.approx(1e3 * (time.perf_counter() - begin) / 50, rel=0.3)


def test_extra_memory_is_counted_at_its_peak() -> None:
    def run() -> torch.Tensor:
        work = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        return work[:1024].clone()

    result, peak = CudaClock().peak(run)
    assert peak == (64 << 20) + result.untyped_storage().nbytes()


def test_an_op_is_right_and_within_the_ceiling() -> None:
    device = torch.device("cuda")
    timing = CudaClock()
    ceilings, _ = measure_ceilings(timing, device, (1 << 30,), (4096,))
    job = norm_workload(8192, 4096, torch.bfloat16, device, with_residual=True)
    rows = [row for row in measure(job, timing, ceilings) if row.contender == OURS]
    assert [row.note for row in rows] == ["", "", ""]
    for row in rows:
        assert row.percent is not None and 10 < row.percent < 110
        assert row.extra is None or row.extra < 64 << 20


def test_the_machine_is_named() -> None:
    facts = machine(torch.device("cuda"), commit="abc")
    assert facts["commit"] == "abc" and facts["driver"] != "unknown" and facts["memory"].endswith("GiB")
