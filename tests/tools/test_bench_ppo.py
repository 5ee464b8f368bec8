"""The benchmark of whole iterations on a shape that takes no time: both do the same work, and the record is kept."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import InputError
from tests.ranks import PATIENCE
from tools.bench_ppo import BenchConfig
from tools.ppo_racers import Load, import_trl

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_ppo.py"
HAS_TRL = importlib.util.find_spec("trl") is not None

TINY = {
    "model": "tiny",
    "rounds": 2,
    "threads": 1,
    "load.prompts": 2,
    "load.samples": 2,
    "load.median_prompt": 12,
    "load.longest_prompt": 24,
    "load.longest_answer": 16,
    "load.mean_answer": 8,
    "peer_batch_sizes": 2,
}


def run(*arguments: object, **changed: object) -> subprocess.CompletedProcess[str]:
    options = TINY | {name.replace("__", "."): value for name, value in changed.items()}
    tiny = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, str(TOOL), *tiny, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_an_iteration_is_measured_by_phase_and_the_record_is_kept(tmp_path: Path) -> None:
    done = run("--peer", "none", "--out", tmp_path / "ppo")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ppo.jsonl").read_text())
    laps = record["iterations"]["this engine"]
    assert len(laps) == TINY["rounds"]
    for lap in laps:
        assert set(lap["phases"]) == {"generation", "reading", "update"} and min(lap["phases"].values()) > 0
        assert sum(lap["phases"].values()) == pytest.approx(lap["seconds"])
        assert 4 <= lap["answer_tokens"] <= 4 * 16 and lap["prompt_tokens"] >= 4 * 8
    speed = np.median([(lap["prompt_tokens"] + lap["answer_tokens"]) / lap["seconds"] for lap in laps])
    assert float(record["our tok/s"].replace(",", "")) == pytest.approx(speed, abs=0.51)
    assert len([line for line in (tmp_path / "ppo.md").read_text().splitlines() if line.startswith("| 20")]) == 1


def test_answers_have_one_length_where_nothing_ends_them(tmp_path: Path) -> None:
    done = run("--peer", "none", "--out", tmp_path / "ppo", load__mean_answer=0)
    assert done.returncode == 0, done.stderr
    laps = json.loads((tmp_path / "ppo.jsonl").read_text())["iterations"]["this engine"]
    assert [lap["answer_tokens"] for lap in laps] == [4 * 16] * 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            BenchConfig(model="tiny", load=Load(longest_prompt=24, longest_answer=250)),
            "Prompts and answers of 274 tokens exceed the context of tiny, 256.",
        ),
        (BenchConfig(load=Load(samples=1)), "--load.samples is 1. Answers are compared in groups: use 2 or more."),
        (
            BenchConfig(peer_batch_sizes=[2, 3]),
            "An optimizer step of 32 answers over 1 minibatches is no multiple of every one of --peer_batch_sizes 2 3. "
            "Change one of them.",
        ),
        (
            BenchConfig(micro_batch_tokens=256),
            "--micro_batch_tokens 256 cannot hold a prompt of 160 tokens with an answer of 192. Raise it, or shorten "
            "them.",
        ),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(config: BenchConfig, said: str) -> None:
    with pytest.raises(InputError) as raised:
        config.check()
        config.shape(torch.device("cpu"))
    assert str(raised.value) == said


@pytest.mark.skipif(HAS_TRL, reason="TRL is installed")
def test_without_trl_the_tool_says_how_to_get_it_or_do_without() -> None:
    with pytest.raises(InputError) as raised:
        import_trl()
    assert "pip install trl" in str(raised.value)
    assert str(raised.value).endswith("or leave the race out with --peer none.")


@pytest.mark.skipif(not HAS_TRL, reason="needs TRL")
@pytest.mark.parametrize("mean_answer", [0, 8])
def test_both_do_the_same_work(tmp_path: Path, mean_answer: int) -> None:
    done = run("--out", tmp_path / "ppo", load__mean_answer=mean_answer)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ppo.jsonl").read_text())
    ours, theirs = (record["iterations"][name] for name in ("this engine", "TRL"))
    assert [lap["prompt_tokens"] for lap in ours] == [lap["prompt_tokens"] for lap in theirs]
    if mean_answer == 0:
        assert [lap["answer_tokens"] for lap in ours] == [lap["answer_tokens"] for lap in theirs]
    assert float(record["largest difference"]) < 1e-4
    speeds = [
        [(lap["prompt_tokens"] + lap["answer_tokens"]) / lap["seconds"] for lap in laps] for laps in (ours, theirs)
    ]
    ratios = [pair[0] / pair[1] for pair in zip(*speeds, strict=True)]
    assert float(record["ratio"]) == pytest.approx(np.median(ratios), abs=0.01)
