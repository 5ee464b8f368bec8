"""The kernel benchmark where there is no GPU: it prints and keeps the audit, and its exit code is the verdict."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.launch import EXIT_GATE
from kernels.offline.audit import Audit, Row
from model.errors import InputError
from tests.ranks import PATIENCE
from tools import bench_kernels

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_kernels.py"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the benchmark measures")


def test_the_audit_is_printed_and_kept(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--ops", "gae", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "kernels-compiled.md").read_text()
    for text in (done.stdout, page):
        assert "gae_kernel" in text and "rms_norm" not in text
        assert "H200, µs" in text and "failures: 0" in text


def test_ops_that_do_not_exist_and_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="TRITON_INTERPRET is set"):
        bench_kernels.audit(bench_kernels.BenchConfig(ops=["gae"]))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="--ops: there is no gea"):
        bench_kernels.audit(bench_kernels.BenchConfig(ops=["gea"]))


def test_a_broken_limit_is_named_and_is_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("gae", "forward", "T 1", "float32", 0, 90, "_gae_kernel", "warps 4", True, broken=("spills 8 bytes",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench_kernels, "audit_package", lambda ops: Audit([row]))
    assert bench_kernels.audit(bench_kernels.BenchConfig()) == EXIT_GATE
    assert "_gae_kernel: spills 8 bytes\n    gae forward on sm_90, T 1" in capsys.readouterr().out
    dropped = replace(row, is_dispatched=False)
    monkeypatch.setattr(bench_kernels, "audit_package", lambda ops: Audit([dropped]))
    assert bench_kernels.audit(bench_kernels.BenchConfig()) == 0
    assert "dropped, because they break a limit: 1" in capsys.readouterr().out
