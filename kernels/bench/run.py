"""A run: ceilings first, then every workload, and what is found is written after each."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.bench import peers
from kernels.bench.ceilings import measure_ceilings
from kernels.bench.clock import Clock
from kernels.bench.files import write
from kernels.bench.host import measure_host
from kernels.bench.machine import slug
from kernels.bench.measure import measure
from kernels.bench.results import Findings
from kernels.bench.tables import ceiling_text, head_text, host_text, row_text, summary_text
from kernels.bench.workload import Workload


@dataclass(frozen=True)
class Sizes:
    """How large the copies and products are that ceilings are taken from."""

    copy_bytes: tuple[int, ...]
    product_widths: tuple[int, ...]


def run_benchmark(
    workloads: Sequence[Workload],
    clock: Clock,
    device: torch.device,
    machine: dict[str, str],
    *,
    out: Path | None,
    seconds: float,
    say: Callable[[str], None],
    sizes: Sizes | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Findings:
    """Measure workloads in order until the time is up.

    Args:
        out: folder for `kernels-<device>.csv`, .json, .md and .png; None writes nothing.
        seconds: no workload is begun later than that; the rest are listed as not measured.
        say: takes a line of output.
        sizes: by default those for a GPU.
    """
    begin = now()
    chosen = () if sizes is None else (sizes.copy_bytes, sizes.product_widths)
    ceilings, lines = measure_ceilings(clock, device, *chosen)
    findings = Findings(machine, ceilings, lines, peers.missing(device))
    say(ceiling_text(findings))
    findings.host = measure_host(device)
    say(host_text(findings.host))
    say(head_text())
    for index, workload in enumerate(workloads):
        if now() - begin > seconds:
            findings.unmeasured = [one.name for one in workloads[index:]]
            break
        for row in findings.add(workload, measure(workload, clock, ceilings)):
            line = row_text(findings, row)
            if line:
                say(line)
        _tidy(device)
        if out is not None:
            write(findings, out / f"kernels-{slug(machine['device'])}", with_plot=False)
    if out is not None:
        write(findings, out / f"kernels-{slug(machine['device'])}", with_plot=True)
    say(summary_text(findings))
    return findings


def _tidy(device: torch.device) -> None:
    """Leave nothing behind for the next workload: no memory, no compiled shapes."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
