"""What others type without having read a page, as it stands but for budgets; and what make starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import PATIENCE
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft
from tests.tools.in_child import TOOLS

ROOT = TOOLS.parent
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
QUIET = ("--log.tensorboard", "false", "--log.curves", "false")


def torchrun(folder: Path, tool: str, *words: object) -> str:
    """`torchrun tools/<tool>.py` and these words; the stage of the model that it leaves in ckpt/<tool>."""
    command = [Path(sys.executable).with_name("torchrun"), TOOLS / f"{tool}.py", *words]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "ckpt" / tool / "MODEL_COMPLETE").read_text(encoding="utf-8"))["stage"]


def test_torchrun_pretrain(tmp_path: Path) -> None:
    assert torchrun(tmp_path, "pretrain", "--train.steps", 2, "--eval.max_tokens", 2000, *QUIET) == "pretrain"


def test_torchrun_ppo_with_a_reward_model(tmp_path: Path) -> None:
    write_small_sft(tmp_path / "ckpt" / "sft", context=256)
    write_small_reward_model(tmp_path / "ckpt" / "rm", mean=0.1, std=0.5, context=256)
    short = ("--train.steps", 1, "--rollout.prompts", 8, "--rollout.max_new_tokens", 4, "--eval.max_tokens", 32)
    assert torchrun(tmp_path, "ppo", "--reward", "ckpt/rm", *short, *QUIET) == "ppo"


@pytest.mark.parametrize("target", TARGETS)
def test_make_starts_what_is_there(target: str) -> None:
    told = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in re.findall(r"\b(?:tools|tests|samples)[\w/]*\.py", told):
        assert (ROOT / file).is_file(), f"make {target} starts {file}"
    if target.startswith("bench-"):
        assert f"tools/{target.replace('-', '_')}.py" in told


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout to clone")
def test_a_fresh_clone_with_an_empty_home_is_given_both_commands(tmp_path: Path) -> None:
    command = ["bash", ROOT / "tests" / "fresh_clone.sh", tmp_path, "--dry-run", "demo", "test"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pip install --quiet --constraint constraints.txt" in told
    assert "tools/demo.py" in told and re.search(r"pytest -n \d", told)
    assert (tmp_path / "checkout" / "constraints.txt").is_file() and list((tmp_path / "home").iterdir()) == []
