"""The evaluation benchmark on a shape that takes no time: both choose, choices agree, and the record is kept."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evals.choice_files import read_cmmlu
from evals.choice_subjects import CMMLU_PAPER
from model.config import PRESETS
from model.errors import InputError
from tests.ranks import PATIENCE
from tools.bench_eval import BenchConfig, Questions, compare, write_questions

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_eval.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--model=tiny", "--rounds=2", "--threads=1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def write_short_questions(directory: Path) -> Path:
    """Three questions a subject, in the layout of CMMLU."""
    for split in ("dev", "test"):
        (directory / split).mkdir(parents=True)
        for number, subject in enumerate(CMMLU_PAPER):
            with open(directory / split / f"{subject}.csv", "w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["", "Question", "A", "B", "C", "D", "Answer"])
                for at in range(3):
                    rows.writerow([at, f"{split}第{number}科第{at}题？", "甲", "乙", "丙", f"丁{at}", "ABCD"[at]])
    return directory


def test_both_choose_choices_agree_and_the_record_is_kept(tmp_path: Path) -> None:
    data = write_short_questions(tmp_path / "data")
    done = run("--data", data, "--shots", 2, "--out", tmp_path / "eval")
    assert done.returncode == 0, done.stderr
    printed = {line[:24].strip(): line[24:].strip() for line in done.stdout.splitlines()}
    record = json.loads((tmp_path / "eval.jsonl").read_text())
    ours, peer = (np.array(record["speeds"][name]) for name in ("this engine", "transformers"))
    assert float(printed["ratio"]) == pytest.approx(np.median(ours / peer), abs=0.01)
    assert record["equal choices"] == "21 of 21" and record["questions"] == "21 of CMMLU"
    # A header and two exemplars before three questions of a subject are computed once.
    assert record["tokens of prompts"] > 2 * record["tokens we compute"]
    assert len([line for line in (tmp_path / "eval.md").read_text().splitlines() if line.startswith("| 20")]) == 1


def test_questions_are_made_up_in_the_numbers_of_cmmlu(tmp_path: Path) -> None:
    write_questions(tmp_path, seed=0)
    bank = read_cmmlu(tmp_path, CMMLU_PAPER, "test", with_exemplars=True)
    counts = Counter(question.subject for question in bank.questions)
    assert [counts[subject] for subject in CMMLU_PAPER] == [148, 237, 106, 176, 145, 185, 169]
    assert not bank.refused and {len(own) for own in bank.exemplars.values()} == {5}


def test_choices_that_differ_are_near_ties_or_named() -> None:
    questions = Questions(["same", "tie", "other"], [[]] * 3, [])
    theirs = torch.tensor([[-1.0, -2.0], [-1.0, -1.0005], [-1.0, -1.1]])
    ours = torch.tensor([[-1.0, -2.0], [-1.0001, -1.0], [-1.1, -1.0]])
    assert compare(questions, ours, theirs) == (["tie"], ["other"])


def test_what_cannot_be_raced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rounds is 0"):
        BenchConfig(rounds=0).check()
    with pytest.raises(InputError, match="--peer_attentions needs at least one"):
        BenchConfig(peer_attentions=[]).check()
    with pytest.raises(InputError, match="--model is 'huge'"):
        BenchConfig(model="huge").check()
    data = write_short_questions(tmp_path)
    with pytest.raises(InputError, match="more than the context"):
        Questions.read(data, BenchConfig(shots=3), replace(PRESETS["tiny"], max_position_embeddings=50))
    with pytest.raises(InputError, match="exceed the vocabulary"):
        Questions.read(data, BenchConfig(shots=3), replace(PRESETS["tiny"], vocab_size=20))
