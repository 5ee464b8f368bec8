"""The command itself, on a shape that takes no time: every kind of case, its records, its page, and its refusals."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.memory import MemoryPlan
from model.errors import InputError
from tests.tools.in_child import Ended, run_tool
from tools.train_cases import Case, named
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
        assert one["config"]["batch_tokens"] == 256 and one["choice"] == ""
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
    one.gpu = "H200"
    tried: list[MemoryPlan] = []
    reasons = []

    def measured(case: object, way: MemoryPlan, reason: str) -> None:
        tried.append(way)
        reasons.append(reason)
        if len(tried) < 4:
            raise torch.cuda.OutOfMemoryError

    one._measure = measured
    one.run(named("1b-4096-full"))
    assert tried[0].setup.tokens_per_pack == 32768 and len(tried) == 4
    # Faster ways that need no less are passed over.
    needed = [way.needed_bytes for way in tried]
    assert needed == sorted(set(needed), reverse=True)
    assert reasons[3].count("and it did not fit.") == 3
    assert "predicted seconds a step: none in packs of 32,768 0." in reasons[0]
    assert reasons[3] in capsys.readouterr().err


@pytest.mark.parametrize("cases", [[], ["1b-4096-full", "7b-4096-full"]])
def test_what_does_not_fit_is_said_and_the_others_run_unless_it_was_asked_for(
    cases: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_train.py"])
    tool: dict[str, Any] = runpy.run_path(str(TOOL))
    ran = []

    class Bench:
        is_on_gpu, contenders = True, ()

        def __init__(self, *_: object) -> None: ...

        def has_time(self) -> bool:
            return len(ran) < 3

        def run(self, case: Case) -> None:
            ran.append(case.name)
            if len(ran) == 1:
                raise InputError(f"{case.name} does not fit this device.")

    globals_of = tool["main"].__globals__
    globals_of.update(_Bench=Bench, start=lambda _: types.SimpleNamespace(device=None), stop=lambda: None)
    if cases:
        with pytest.raises(InputError, match="1b-4096-full does not fit"):
            tool["main"](tool["BenchConfig"](cases=cases))
    else:
        tool["main"](tool["BenchConfig"]())
        assert ran[:2] == ["7b-4096-full", "1b-4096-full"] and len(ran) == 3
        assert "7b-4096-full does not fit this device." in capsys.readouterr().err
