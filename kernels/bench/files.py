"""Findings as files: one line a measurement in CSV, everything in JSON, a page, and plots where matplotlib is."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kernels.bench.results import Findings
from kernels.bench.tables import page
from kernels.bench.workload import Row

COLUMNS = (
    "op", "shape", "dtype", "pass", "contender", "role", "ms", "p20", "p80", "rounds", "gb_per_s", "tflop_per_s",
    "percent_of_ceiling", "floor_ms", "extra_mib", "bytes", "flops", "note",
)  # fmt: skip


def write(findings: Findings, stem: Path, with_plot: bool) -> None:
    """`stem`.csv, .json, .md, and .png if it is wanted. A file is whole or the one before."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with open(_draft(stem, ".csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(record(row) for row in findings.rows)
    _draft(stem, ".json").write_text(json.dumps(as_json(findings), indent=1, ensure_ascii=False), encoding="utf-8")
    _draft(stem, ".md").write_text(page(findings), encoding="utf-8")
    for suffix in (".csv", ".json", ".md"):
        os.replace(_draft(stem, suffix), stem.with_name(stem.name + suffix))
    if with_plot:
        plot(findings, stem.with_name(stem.name + ".png"))


def _draft(stem: Path, suffix: str) -> Path:
    return stem.with_name(f".{stem.name}{suffix}")


def record(row: Row) -> dict[str, Any]:
    """A row by the names of COLUMNS; empty where nothing was measured."""
    times = row.times
    return {
        "op": row.op,
        "shape": row.shape,
        "dtype": row.dtype,
        "pass": row.stage,
        "contender": row.contender,
        "role": row.role,
        "ms": None if times is None else round(times.median, 6),
        "p20": None if times is None else round(times.p20, 6),
        "p80": None if times is None else round(times.p80, 6),
        "rounds": None if times is None else times.rounds,
        "gb_per_s": None if times is None else round(row.work.bytes / times.median / 1e6, 3),
        "tflop_per_s": None if times is None else round(row.work.flops / times.median / 1e9, 3),
        "percent_of_ceiling": None if row.percent is None else round(row.percent, 2),
        "floor_ms": round(row.floor, 6),
        "extra_mib": None if row.extra is None else round(row.extra / 2**20, 3),
        "bytes": row.work.bytes,
        "flops": row.work.flops,
        "note": row.note,
    }


def as_json(findings: Findings) -> dict[str, Any]:
    return {
        "machine": findings.machine,
        "ceilings": {
            "copy_bytes_per_s": findings.ceilings.copy,
            "bf16_flop_per_s": findings.ceilings.product,
            "tried": findings.ceiling_lines,
        },
        "missing_peers": findings.missing,
        "rows": [record(row) for row in findings.rows],
        "targets": [asdict(verdict) for verdict in findings.verdicts],
        "liger": {"ratios": findings.liger_ratios(), **findings.liger_summary()},
        "host_microseconds": [asdict(row) for row in findings.host],
        "unmeasured": findings.unmeasured,
    }


def plot(findings: Findings, path: Path) -> None:
    """Per cent of the ceiling, ours and each peer's, at the first shape of every op. Nothing without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    first = {op: row.shape for row in reversed(findings.ours()) for op in [row.op]}
    parted = {row.op for row in findings.rows if row.stage == "forward"}  # the rest is timed as a whole
    shown = [
        row
        for row in findings.rows
        if first.get(row.op) == row.shape
        and row.role in ("ours", "peer")
        and not (row.stage == "both" and row.op in parted)
    ]
    jobs = list(dict.fromkeys((row.op, row.dtype, row.stage) for row in shown))
    names = list(dict.fromkeys(row.contender for row in shown))
    if not jobs:
        return
    figure = Figure(figsize=(9, 1 + 0.42 * len(jobs)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        found = {(row.op, row.dtype, row.stage): row.percent or 0.0 for row in shown if row.contender == name}
        places = [place + (index - (len(names) - 1) / 2) * height for place in range(len(jobs))]
        axes.barh(places, [found.get(job, 0.0) for job in jobs], height, label=name)
    axes.set_yticks(range(len(jobs)), [f"{op}, {stage}" for op, _, stage in jobs], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("per cent of the ceiling measured in the same run")
    axes.set_title(f"{findings.machine['device']}, {findings.machine['date']}", fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
