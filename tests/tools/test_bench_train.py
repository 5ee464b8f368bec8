"""The command itself, on a shape that takes no time: every kind of case, its records, its page, and its refusals."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tools.in_child import Ended, run_tool
from tools.train_cases import named
from tools.train_parts import PARTS

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_train.py"
MINI = ["--batch_tokens", 256, "--threads", 1]


def bench(folder: Path, *words: object) -> Ended:
    (ended,) = run_tool("bench_train", *MINI, *words, cwd=folder)
    return ended


@pytest.mark.parametrize(
    ("kinds", "peers"), [(("full", "reward"), ("transformers", "plain")), (("ragged", "sft"), ("plain",))]
)
def test_cases_of_each_kind_are_measured_beside_peers(
    tmp_path: Path, kinds: tuple[str, ...], peers: tuple[str, ...]
) -> None:
    cases = [f"mini-64-{kind}" for kind in kinds]
    words = ["--contenders", "liger", *peers, "--laps", 2, "--out", "deep/train"]
    done = bench(tmp_path, "--cases", *cases, *words)
    assert done.code == 0, done.stderr
    assert "Without liger: Liger-Kernel runs on GPUs only." in done.stderr
    records = [json.loads(line) for line in (tmp_path / "deep" / "train.jsonl").read_text().splitlines()]
    found = {(one["case"], one["contender"]): one for one in records}
    assert list(found) == [(case, name) for case in cases for name in ("ours", *peers)]
    for one in records:
        assert not one["failure"] and len(one["laps"]) == 2
        assert one["tokens_per_second"] == pytest.approx(np.median(one["laps"]), abs=0.1)
        assert sum(one["shares"][part] for part in PARTS) == pytest.approx(1.0)
        assert one["shares"]["products"] > 0 and one["shares"]["optimizer"] > 0
        assert one["config"]["batch_tokens"] == 256
        assert one["tokens_per_step"] == found[one["case"], "ours"]["tokens_per_step"]
    table = (tmp_path / "deep" / "train.md").read_text(encoding="utf-8")
    assert all(line in table for line in done.stdout.splitlines() if line.startswith("| mini"))


def test_ours_with_8_bit_products_runs_beside_ours(tmp_path: Path) -> None:
    cases = ("mini-64-full", "mini-64-sft")
    done = bench(tmp_path, "--cases", *cases, "--contenders", "ours+fp8", "--laps", 1, "--trace", "false", "--out", "x")
    assert done.code == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    ran = [(one["case"], one["contender"], one["settings"].endswith("8-bit products")) for one in records]
    assert ran == [
        ("mini-64-full", "ours", False),
        ("mini-64-full", "ours+fp8", True),
        ("mini-64-sft", "ours", False),
    ]


def test_without_time_nothing_begins_and_all_is_named(tmp_path: Path) -> None:
    done = bench(tmp_path, "--minutes", 0, "--cases", "mini-64-full", "mini-64-sft")
    assert done.code == 0 and done.stdout == ""
    assert "Not reached in 0 minutes: mini-64-full mini-64-sft. Run them with --cases." in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--cases", "mini-64-ppo"], "--cases: mini-64-ppo is no case. Write shape-context-kind"),
        (["--contenders", "plain", "megatron"], "--contenders: there is no megatron. There are transformers, liger,"),
        (["--cases", "mini-64-full", "--tokens_per_pack", 100], "--batch_tokens 256 does not divide into packs"),
        (["--laps", 0], "--laps is 0"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, words: list[object], sentence: str) -> None:
    done = bench(tmp_path, *words)
    assert done.code == 2
    assert done.stderr.strip().splitlines()[-1].startswith(sentence)


def test_the_next_plan_is_taken_where_the_first_did_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU that is none: what it has is known, what is measured is made up."""
    monkeypatch.setattr(sys, "argv", ["bench_train.py"])
    tool: dict[str, Any] = runpy.run_path(str(TOOL))
    kind = tool["_Bench"]
    one = kind.__new__(kind)
    one.config, one.batch_tokens, one.precision, one.memory = tool["BenchConfig"](), 32768, "bf16", 100 << 30
    tried, kept = [], []

    def measured(case: object, way: Any) -> list[str]:
        tried.append((way.setup.recompute, way.setup.tokens_per_pack))
        if len(tried) < 3:
            raise torch.cuda.OutOfMemoryError
        return ["records"]

    one._measure, one._tell = measured, kept.append
    one.run(named("1b-4096-full"))
    assert tried == [("none", 32768), ("none", 16384), ("none", 8192)] and kept == [["records"]]
    assert capsys.readouterr().err.count("and it did not fit.") == 2
