"""The benchmark on a shape that takes no time: both racers train, and the record says what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.benchmark import BenchShape, Lap, append_record, bench_corpus, median_speed, race, steps_of_documents

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_train.py"

TINY = {
    "shape.hidden_size": 32,
    "shape.intermediate_size": 64,
    "shape.num_layers": 2,
    "shape.num_heads": 2,
    "shape.num_kv_heads": 1,
    "shape.vocab_size": 128,
    "shape.context": 64,
    "shape.documents": 200,
    "shape.median_length": 30,
    "batch_tokens": 512,
    "rounds": 2,
    "threads": 1,
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    command = [sys.executable, str(TOOL), *tiny, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_both_are_measured_and_the_record_is_kept(tmp_path: Path) -> None:
    for _ in range(2):
        done = run("--tokens_per_pack", 128, "--peer_batch_sizes", 1, 4, "--out", tmp_path / "train")
        assert done.returncode == 0, done.stderr
    printed = {line[:24].strip(): line[24:].strip() for line in done.stdout.splitlines()}
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(records) == 2
    ours, peer = (np.median(records[-1]["speeds"][name]) for name in ("this engine", "transformers"))
    assert float(printed["ratio"]) == pytest.approx(ours / peer, abs=0.01)
    assert records[-1]["peer's batch size"] in (1, 4)
    assert records[-1]["config"]["shape"]["hidden_size"] == 32
    table = (tmp_path / "train.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("| 20")]) == 2


def test_sizes_that_do_not_fit_are_refused() -> None:
    done = run("--tokens_per_pack", 100)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("--tokens_per_pack 100 must divide --batch_tokens 512")


def test_documents_have_the_committed_lengths(tmp_path: Path) -> None:
    shape = BenchShape(documents=300)
    corpus = bench_corpus(shape, tmp_path)
    lengths = corpus.store.lengths(corpus.documents())
    assert np.array_equal(np.sort(lengths), np.sort(shape.lengths()))
    assert lengths.min() >= 16 and lengths.max() == 512
    assert np.median(lengths) == pytest.approx(180, rel=0.15)


def test_peer_sees_every_document_once_an_epoch(tmp_path: Path) -> None:
    corpus = bench_corpus(BenchShape(documents=120, context=64), tmp_path)
    steps = steps_of_documents(corpus, 0, 256)
    seen: list[bytes] = []
    while len(seen) < 120:
        step = next(steps)
        assert sum(map(len, step)) >= 256 > sum(map(len, step[:-1]))
        seen += [document.numpy().tobytes() for document in step]
    expected = {corpus.read(document).astype(np.int64).tobytes() for document in corpus.documents().tolist()}
    assert set(seen[:120]) == expected


def test_racers_take_turns_and_nobody_is_always_first() -> None:
    order: list[str] = []

    class Racer:
        def __init__(self, name: str, speed: int) -> None:
            self.name, self.speed = name, speed

        def step(self) -> Lap:
            order.append(self.name)
            return Lap(self.speed, 1.0)

    laps = race({"a": Racer("a", 10), "b": Racer("b", 20)}, 3)
    assert "".join(order) == "abbaab"
    assert (median_speed(laps["a"]), median_speed(laps["b"])) == (10, 20)


def test_a_table_keeps_what_was_there(tmp_path: Path) -> None:
    for value in (1, 2):
        append_record(tmp_path / "deep" / "table", {"speed": value}, "# Heading", {"Speed": "speed", "None": "none"})
    assert (
        tmp_path / "deep" / "table.md"
    ).read_text() == "# Heading\n\n| Speed | None |\n|---|---|\n| 1 |  |\n| 2 |  |\n"
