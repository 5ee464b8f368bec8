"""The generation benchmark on a shape that takes no time: both answer, answers agree, and the record is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ranks import PATIENCE

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_generate.py"

TINY = {
    "model": "tiny",
    "rounds": 2,
    "threads": 1,
    "load.requests": 5,
    "load.median_prompt": 12,
    "load.median_answer": 6,
    "load.longest": 20,
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(TOOL), *tiny, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_both_are_measured_answers_agree_and_the_record_is_kept(tmp_path: Path) -> None:
    done = run("--peer_batch_sizes", 2, 5, "--out", tmp_path / "generate")
    assert done.returncode == 0, done.stderr
    printed = {line[:24].strip(): line[24:].strip() for line in done.stdout.splitlines()}
    record = json.loads((tmp_path / "generate.jsonl").read_text())
    ours, peer = (np.median(record["speeds"][name]) for name in ("this engine", "transformers"))
    assert float(printed["ratio"]) == pytest.approx(ours / peer, abs=0.01)
    assert record["peer's batch size"] in (2, 5) and record["peer's cache"] in ("dynamic", "static")
    assert record["equal answers"] == "5 of 5"
    assert len([line for line in (tmp_path / "generate.md").read_text().splitlines() if line.startswith("| 20")]) == 1


def test_answers_that_do_not_fit_the_context_are_refused() -> None:
    done = run("--load.longest", 200)
    assert done.returncode == 2
    assert done.stderr.strip() == "--load.longest 200, twice, exceeds the context of tiny, 256."
