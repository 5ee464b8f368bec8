"""The commands that prepare and check data, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.corpus import open_corpus
from model.tokenizer_training import train_tokenizer
from tests.engine.data.stand_in import Bytes
from tests.ranks import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"第{number}例：高血压患者应低盐饮食，按时服药，定期复诊并监测血压。" for number in range(40)]


def tool(name: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "a.json").write_text(json.dumps([*TEXTS, 5], ensure_ascii=False))
    train_tokenizer(TEXTS, folder / "tokenizer", vocab_size=325)
    return folder


def test_parts_prepared_by_separate_jobs_are_checked_as_one(folder: Path) -> None:
    for part in ("1/2", "2/2"):
        words = (
            "--data",
            folder / "a.json",
            "--tokenizer",
            folder / "tokenizer",
            "--out",
            folder / "out",
            "--part",
            part,
        )
        done = tool("prepare.py", *words)
        assert done.returncode == 0, done.stderr
    assert "prepared     " + str(folder / "out" / "part-00002-of-00002") in done.stdout
    assert open_corpus([folder / "out"]).num_documents == 40
    done = tool("check_data.py", "--data", folder / "out", "--verify", "--held_out", folder / "a.json")
    assert done.returncode == 0, done.stderr
    assert "documents   40\n" in done.stdout and "40 of them also to be trained on" in done.stdout
    assert f"e.g. {folder}/a.json:1: a record is an object or a text, this one is a number" in done.stdout


@pytest.mark.parametrize("name", ["prepare.py", "check_data.py"])
def test_help_names_the_options(name: str) -> None:
    done = tool(name, "--help")
    assert done.returncode == 0
    assert "--data.on_error {skip,fail}" in done.stdout and "--tokenizer" in done.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        ([], "There is no data"),
        (["--data", "a.json", "--part", "2"], "--part 2: give it as i/n"),
        (["--data", "a.json", "--part", "3/2"], "Choose one from 1 to 2"),
        (["--data", "a.json", "--workers", "0"], "--workers 0: give at least 1"),
        (["--data", "a.json", "--data.on_error", "fail"], "a.json:1: a record is an object or a text"),
        (["--data", "a.json", "--data.min_characters", "0"], "--data.min_characters is 0"),
        (["--data", "a.json", "--data.encodng", "gbk"], "Did you mean --data.encoding?"),
    ],
)
def test_mistakes_end_with_code_2_and_one_sentence(folder: Path, words: list[str], sentence: str) -> None:
    words = [str(folder / word) if word.endswith(".json") else word for word in words]
    done = tool("prepare.py", "--tokenizer", folder / "tokenizer", "--out", folder / "no", *words)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_stand_in_is_not_taken_for_a_tokenizer(folder: Path) -> None:
    Bytes().save(folder / "empty")
    done = tool("prepare.py", "--data", folder / "a.json", "--tokenizer", folder / "empty", "--out", folder / "no")
    assert done.returncode == 2 and "neither tokenizer.json nor tokenizer.model" in done.stderr
