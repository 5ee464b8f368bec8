"""The benchmark of the server on a model that takes no time: answers are compared, the record is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import PATIENCE
from tests.tools.small_chat import write_small_chat_model
from tools.bench_serve import Answer, Asking, questions, slope

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_serve.py"


def test_clients_get_what_they_get_alone_and_the_record_is_kept(tmp_path: Path) -> None:
    write_small_chat_model(tmp_path / "model")
    words = [
        "--model",
        "model",
        "--device",
        "cpu",
        "--clients",
        "4",
        "--seconds",
        "3",
        "--tokens",
        "6",
        "--out",
        "kept",
    ]
    done = subprocess.run(
        [sys.executable, str(TOOL), *words], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "kept.jsonl").read_text())
    assert record["requests"] > 4 and record["failed"] == record["different answers"] == 0
    assert record["answers that differ alone"] > 32
    assert float(record["ratio"]) == pytest.approx(
        float(record["tok/s together"]) / float(record["tok/s alone"]), abs=0.1
    )
    assert float(record["processor ms/tok together"]) > 0
    assert len(record["memory by second"]) >= 2 and min(record["memory by second"]) > 50
    assert len([line for line in (tmp_path / "kept.md").read_text().splitlines() if line.startswith("| 20")]) == 1


def test_an_answer_that_is_not_the_one_given_alone_is_found() -> None:
    alone = {"a": Answer("x", 1, 0.1), "b": Answer("y", 1, 0.1)}
    got = [("a", alone["a"]), ("b", alone["a"]), ("b", alone["b"])]
    assert Asking(got).different(alone) == ["b"]
    assert len(set(questions())) == 64


def test_the_slope_is_that_of_what_comes_after_the_first_quarter() -> None:
    """A leak of 0.1 MiB a second behind a start that grows by a hundred at once."""
    samples = [(float(at), (100.0 if at >= 25 else 0.0) + 0.1 * at) for at in range(101)]
    assert slope(samples) == pytest.approx(6.0)
