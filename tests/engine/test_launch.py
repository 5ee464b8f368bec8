"""Exit codes, and the one sentence: last, once, also under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys, time
from dataclasses import dataclass
sys.path.insert(0, {root!r})
from engine.launch import DivergedError, StoppedError, run
from model.errors import InputError

@dataclass
class Recipe:
    '''A job that ends as it is told.'''
    end: str = "well"

def job(config):
    if config.end == "input":
        raise InputError("data.jsonl:7: not JSON. Mend the line.")
    if config.end == "diverged":
        raise DivergedError("Diverged at step 9.")
    if config.end == "stopped":
        raise StoppedError("Stopped by a signal; saved after step 3.", 143)
    if config.end == "ours":
        raise KeyError("oops")
    if config.end == "gate":
        return 4
    print("result" * (100_000 if config.end == "long" else 1))

run(job, Recipe)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launch") / "job.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    return path


def start(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE, env=environment)


@pytest.mark.parametrize(
    ("end", "code", "last_line"),
    [
        ("input", 2, "data.jsonl:7: not JSON. Mend the line."),
        ("diverged", 3, "Diverged at step 9."),
        ("gate", 4, ""),
        ("stopped", 143, "Stopped by a signal; saved after step 3."),
        ("ours", 1, "KeyError: 'oops'"),
    ],
)
def test_every_outcome_has_its_exit_code_and_sentence(script: Path, end: str, code: int, last_line: str) -> None:
    ended = start(sys.executable, script, "--end", end)
    assert ended.returncode == code
    assert ended.stderr.rstrip().split("\n")[-1] == last_line
    assert ("Traceback" in ended.stderr) == (end == "ours")
    assert ended.stdout == ""


def test_success_is_zero_and_an_unknown_option_is_two(script: Path) -> None:
    well = start(sys.executable, script)
    assert (well.returncode, well.stdout) == (0, "result\n")
    wrong = start(sys.executable, script, "--ent", "well")
    assert (wrong.returncode, wrong.stderr) == (2, "--ent is not an option. Did you mean --end?\n")


@pytest.mark.parametrize("end", ["well", "long"])
def test_a_reader_that_has_left_is_no_mistake(script: Path, end: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(
        [sys.executable, script, "--end", end], stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_under_torchrun_the_sentence_comes_once_and_in_the_final_report(script: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    ended = start(torchrun, "--nproc-per-node", "2", script, "--end", "input")
    assert ended.returncode == 1
    assert ended.stderr.count("data.jsonl:7: not JSON. Mend the line.") == 1
    report = ended.stderr.rsplit("Root Cause", 1)[1]
    assert "data.jsonl:7" in report and "exitcode  : 2" in report
