"""Measure the candidates of every entry of the launch table on this GPU, and write the fastest into the table.

    make tune-kernels
    python tools/tune_kernels.py --kernels attention_fwd --seconds 300

Writes kernels/launches.json and kernels/attention/providers.json, entries of this chip only, and says what was
measured on a page beside the benchmarks. Never part of a run: tables are committed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from engine.launch import run
from kernels.backend import chip
from kernels.bench.attending import attention_workload
from kernels.bench.clock import CudaClock
from kernels.bench.machine import machine, slug
from kernels.bench.tuning import (
    Choice,
    order_providers,
    representatives,
    tune_launches,
    tuning_page,
    write_launches,
    write_providers,
)
from model.errors import InputError


@dataclass
class TuneConfig:
    """Measure launch configurations on a GPU, and write the fastest into the committed tables."""

    kernels: list[str] = field(default_factory=list)
    """names in launches.json; all by default"""
    providers: bool = True
    """time the providers of attention too"""
    seconds: float = 480
    """begin no new entry after that"""
    out: str = "docs/benchmarks"
    """folder of the page that says what was measured"""
    commit: str | None = None
    """where the checkout has no history"""


def main(config: TuneConfig) -> None:
    if not torch.cuda.is_available():
        raise InputError("Tuning measures on a GPU, and there is none here. `make bench-kernels` audits without one.")
    begin = time.monotonic()
    device, clock = torch.device("cuda"), CudaClock()
    facts = machine(device, config.commit)
    choices: list[Choice] = []
    for choice in tune_launches(
        list(representatives(device)),
        clock,
        kernels=config.kernels,
        is_up=lambda: time.monotonic() - begin > config.seconds,
    ):
        choices.append(choice)
        write_launches(choices)
        verdict = "kept" if choice.kept else f"now {dict(choice.options)}"
        print(f"{choice.kernel}, {choice.key}: {choice.before:.4g} -> {choice.best:.4g} ms, {verdict}", flush=True)
    orders = []
    if config.providers:
        workloads = [
            attention_workload([8192] * 2, 4096 // width, 4096 // width, width, torch.bfloat16, device)
            for width in (64, 80, 96, 128, 256)
        ]
        orders = order_providers(workloads, clock, 90 if chip(device).arch >= 90 else 80)
        write_providers(orders, f"{facts['device']}, {facts['date']}, {facts['commit']}")
    page = Path(config.out) / f"launches-{slug(facts['device'])}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(tuning_page(facts, choices, orders), encoding="utf-8")


if __name__ == "__main__":
    run(main, TuneConfig)
