"""On a GPU, time every op against its peers and the machine's ceilings; without one, audit what would run there.

    make bench-kernels
    python tools/bench_kernels.py --ops rms_norm swiglu     # some ops, and write nothing
    python tools/bench_kernels.py --quick                   # the first shape of each op
    python tools/bench_kernels.py --host                    # host time of calls only, on any machine
    python tools/bench_kernels.py --out docs/benchmarks     # without a GPU: write kernels-compiled.md too

A whole run on a GPU writes docs/benchmarks/kernels-<gpu>.csv, .json, .md and .png. Exit code 4: an op was wrong, or
without a GPU a kernel broke a limit.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from engine.launch import EXIT_GATE, run
from kernels.bench.clock import CudaClock
from kernels.bench.host import measure_host
from kernels.bench.machine import ROOT, machine
from kernels.bench.run import run_benchmark
from kernels.bench.tables import host_text
from kernels.bench.workloads import BY_OP, workloads
from kernels.offline.cases import cases
from kernels.offline.floors import floors
from kernels.offline.package import audit_package
from kernels.offline.report import page, text
from model.errors import InputError


@dataclass
class BenchConfig:
    """Time every op on a GPU, or audit its kernels without one."""

    ops: list[str] = field(default_factory=list)
    """ops to measure; all by default"""
    quick: bool = False
    """the first shape of each op only"""
    host: bool = False
    """only the host time of calls, which any machine can tell"""
    seconds: float = 420
    """begin no new measurement after that"""
    out: str | None = None
    """folder for the files; by default docs/benchmarks for a whole run, and none for others"""
    commit: str | None = None
    """where the checkout has no history"""


def main(config: BenchConfig) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.host:
        print(host_text(measure_host(device)))
        return 0
    return measure(config, device) if device.type == "cuda" else audit(config)


def measure(config: BenchConfig, device: torch.device) -> int:
    unknown = sorted(set(config.ops) - set(BY_OP))
    if unknown:
        raise InputError(f"--ops: there is no {', '.join(unknown)}. There are {', '.join(BY_OP)}.")
    is_whole = not config.ops and not config.quick
    out = Path(config.out) if config.out else ROOT / "docs" / "benchmarks" if is_whole else None
    findings = run_benchmark(
        workloads(device, config.ops, config.quick),
        CudaClock(),
        device,
        machine(device, config.commit),
        out=out,
        seconds=config.seconds,
        say=partial(print, flush=True),
    )
    return EXIT_GATE if findings.wrong else 0


def audit(config: BenchConfig) -> int:
    if os.environ.get("TRITON_INTERPRET"):
        raise InputError("TRITON_INTERPRET is set: kernels that are interpreted are not compiled. Unset it.")
    known = {case.op for case in cases()}
    unknown = sorted(set(config.ops) - known)
    if unknown:
        raise InputError(f"--ops: there is no {', '.join(unknown)}. There are {', '.join(sorted(known))}.")
    found = audit_package(config.ops)
    bounds = list(floors(case for case in cases() if not config.ops or case.op in config.ops))
    print(text(found, bounds))
    if config.out:
        file = Path(config.out) / "kernels-compiled.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page(found, bounds, machine(torch.device("cpu"), config.commit)), encoding="utf-8")
    return EXIT_GATE if found.failures else 0


if __name__ == "__main__":
    run(main, BenchConfig)
