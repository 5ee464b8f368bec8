"""What the benchmark says of what it measured: targets, peers, files, and the host time of calls."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.bench import targets
from kernels.bench.clock import Times
from kernels.bench.host import measure_host
from kernels.bench.machine import slug
from kernels.bench.results import Findings
from kernels.bench.tables import page, row_text, summary_text
from kernels.bench.workload import OURS, Contender, Inputs, Row, Work
from tests.kernels.bench_jobs import CPU, UNIT, Stopwatch, doubling, few_rounds, found

__all__ = ["few_rounds"]  # a fixture for every test here


def test_an_op_of_ours_that_is_wrong_is_found_and_said() -> None:
    job = doubling([Contender(OURS, lambda x: 3 * x, "ours"), Contender("eager", lambda x: 2 * x)])
    findings = found([job])
    assert {row.contender for row in findings.wrong} == {OURS}
    assert "WRONG: double 64 float32, forward, ours: wrong: result 0" in summary_text(findings)


def test_a_job_that_cannot_be_done_at_all_ends_no_run() -> None:
    def make(seed: int) -> Inputs:
        if seed:
            raise torch.OutOfMemoryError("no memory for the second set")
        return (torch.randn(64).requires_grad_(),)

    impossible = replace(doubling([Contender(OURS, lambda x: 2 * x, "ours")]), make=make)
    findings = found([impossible, doubling([Contender(OURS, lambda x: 2 * x, "ours")])])
    assert {row.note for row in findings.wrong} == {"failed: OutOfMemoryError: no memory for the second set"}
    assert len(findings.rows) == 6 and all(row.times is not None for row in findings.rows[3:])


def test_a_peer_that_fails_is_noted_and_harms_nobody() -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("head dimension not supported\nsecond line")

    findings = found([doubling([Contender(OURS, lambda x: 2 * x, "ours"), Contender("flash2", fails)])])
    assert findings.wrong == []
    assert {row.note for row in findings.failed_peers} == {"failed: RuntimeError: head dimension not supported"}
    assert all(row.times is not None for row in findings.ours())
    assert "- flash2 on double 64, forward: failed" in page(findings)


def row(contender: str, stage: str = "both", ms: float | None = 1.0, **fields) -> Row:
    role = {"ours": "ours", "auto": "provider", "sdpa": "provider", "the bare products": "bound"}.get(contender, "peer")
    given = {"op": "op", "shape": "8", "dtype": "bfloat16", "work": Work(1e6), "floor": 0.5} | fields
    times = None if ms is None else Times(ms, ms, ms, 20)
    return Row(stage=stage, contender=contender, role=role, times=times, **given)  # type: ignore[arg-type]


def test_targets_are_read_off_the_rows() -> None:
    rows = [
        row("ours", ms=1.0, extra=3 << 20),
        row("the bare products", ms=0.8),
        row("auto", ms=0.9),
        row("sdpa", ms=0.6),
        row("ours", "forward", ms=0.5, work=Work(1.0, 2e11)),
    ]
    results = {(one.contender, one.stage): one for one in rows}
    assert targets.percent("both", 50).verdict(results) == (50.0, "met")
    assert targets.percent("both", 51).verdict(results) == (50.0, "missed")
    assert targets.times("both", "the bare products", 1.25).verdict(results) == (1.25, "met")
    assert targets.times("both", "the bare products", 1.2).verdict(results)[1] == "missed"
    assert targets.teraflops("forward", 450).verdict(results) == (400.0, "missed")
    assert targets.extra_memory("both", 3 << 20).verdict(results) == (3.0, "met")
    assert targets.share_of_best("both", "auto", 0.97).verdict(results) == (pytest.approx(0.6 / 0.9), "missed")
    assert targets.percent("backward", 1).verdict(results) == (None, "not measured")
    assert targets.times("both", "nobody", 1).verdict(results) == (None, "not measured")


def findings_of(*rows: Row) -> Findings:
    findings = Findings({"device": "NVIDIA H200", "date": "today"}, UNIT, [], {"liger": "not here"})
    findings.rows = list(rows)
    return findings


def test_the_best_peer_is_the_fastest_that_competes() -> None:
    ours = row("ours", ms=2.0)
    findings = findings_of(
        ours,
        row("eager", ms=6.0),
        row("liger", ms=3.0),
        row("the bare products", ms=1.0),
        row("sdpa", ms=1.0),
        row("compile", ms=None, note="failed: it"),
        row("cudnn", "forward", ms=0.1),
    )
    best = findings.best_peer(ours)
    assert best is not None and best.contender == "liger"
    assert findings.speed_over(ours, best) == 1.5
    assert "liger 3" in row_text(findings, ours) and "1.50" in row_text(findings, ours)


def test_speed_over_liger_is_summed_up_over_whole_passes() -> None:
    findings = findings_of(
        row("ours", ms=1.0),
        row("liger", ms=4.0),
        row("liger packed", ms=2.0),  # the better of Liger's two counts
        row("ours", "forward", ms=1.0),  # a part of `both`: not counted
        row("liger", "forward", ms=100.0),
        row("ours", "forward", ms=1.0, shape="9"),  # an op without a backward
        row("liger", "forward", ms=0.5, shape="9"),
        row("ours", ms=1.0, shape="10"),
        row("liger", ms=8.0, shape="10"),
    )
    assert findings.liger_summary() == pytest.approx({"slowest": 0.5, "median": 2.0, "geometric mean": 2.0})
    assert "slowest 0.50 (missed: ≥ 1), median 2.00 (met: ≥ 1.15)" in findings.liger_verdict()
    assert findings_of(row("ours")).liger_verdict() == "Liger-Kernel: not measured (not here)."


def test_what_binds_decides_the_rate() -> None:
    assert row("ours", ms=2.0, work=Work(1e9, 1e9)).rate == 5e11
    assert row("ours", ms=2.0, work=Work(1e9, 1e12)).rate == 5e14
    assert row("ours", ms=None).rate is None and row("ours", ms=None).percent is None


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    aims = (targets.percent("forward", 0.0), targets.extra_memory("both", 1))
    contenders = [Contender(OURS, lambda x: 2 * x, "ours"), Contender("eager", lambda x: x + x)]
    findings = found([doubling(contenders, aims=aims)], out=tmp_path)
    stem = tmp_path / "kernels-test"
    lines = list(csv.DictReader(Path(f"{stem}.csv").read_text().splitlines()))
    assert [(line["pass"], line["contender"]) for line in lines] == [
        (stage, name) for stage in ("forward", "backward", "both") for name in ("ours", "eager")
    ]
    assert float(lines[0]["ms"]) == pytest.approx(findings.rows[0].times.median, abs=1e-6)  # type: ignore[union-attr]
    assert float(lines[0]["bytes"]) == 512 and lines[0]["extra_mib"] == ""
    data = json.loads(Path(f"{stem}.json").read_text())
    assert data["targets"][0]["verdict"] == "met" and data["targets"][1]["verdict"] == "not measured"
    assert data["ceilings"]["copy_bytes_per_s"] == findings.ceilings.copy
    assert len(data["host_microseconds"]) == len(findings.host) > 5
    text = Path(f"{stem}.md").read_text()
    assert "# Kernels on NVIDIA Test" in text and "Targets: 1 of 1 met, 1 not measured." in text
    pytest.importorskip("matplotlib")
    assert Path(f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".kernels*"))


def test_what_the_time_does_not_suffice_for_is_named(tmp_path: Path) -> None:
    now = Stopwatch()

    def slow(x: Tensor) -> Tensor:
        now.work(1.0)
        return 2 * x

    jobs = [replace(doubling([Contender(OURS, slow, "ours")]), shape=name) for name in ("a", "b", "c")]
    findings = found(jobs, seconds=5.0, now=now)
    assert findings.unmeasured == ["double b float32", "double c float32"]
    assert {one.shape for one in findings.rows} == {"a"}
    assert "The time was up: 2 not measured: double b float32, double c float32." in summary_text(findings)


def test_host_time_is_that_of_calls_without_launches() -> None:
    ticks = Stopwatch()

    def now() -> float:
        ticks.work(1e-3)
        return ticks()

    rows = {one.op: one for one in measure_host(CPU, now, calls=10, batches=3)}
    assert rows["an empty function"].launches == 0
    assert rows["rms_norm"].launches == 1 and rows["sample"].launches > 0
    assert rows["rms_norm"].inference == pytest.approx(100.0)  # one tick of 1000 µs over ten calls
    assert rows["rms_norm"].backward == pytest.approx(100.0) and not rows["rms_norm"].is_met
    assert rows["sample"].backward is None


def test_files_are_named_after_the_chip() -> None:
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA A100-SXM4-80GB") == "a100-sxm4-80gb"
