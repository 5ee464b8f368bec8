"""The tools on the bundled data, told to write where somebody's model is: one sentence, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.small_base import write_small_base
from tests.tools.in_child import run_tool

CALLS = {
    "pretrain": (("--out", "ckpt/sft"),),
    "sft": (("--out", "ckpt/pretrain"), ("--out", "ckpt/other")),
    "rm": (("--out", "ckpt/sft"), ("--out", "ckpt/other")),
    "dpo": (("--out", "ckpt/sft"), ("--out", "ckpt/other")),
    "ppo": (("--out", "ckpt/sft"), ("--out", "ckpt/rm", "--reward", "ckpt/rm"), ("--out", "ckpt/other")),
    "rejection": (("--out", "ckpt/sft"), ("--out", "ckpt/rm"), ("--out", "ckpt/other")),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small_base(tmp_path / "ckpt" / "pretrain", context=128)
    for name in ("sft", "rm", "other"):
        shutil.copytree(tmp_path / "ckpt" / "pretrain", tmp_path / "ckpt" / name)
    return tmp_path


@pytest.mark.parametrize(("tool", "words"), [(tool, words) for tool, calls in CALLS.items() for words in calls])
def test_a_model_that_somebody_has_is_not_touched(folder: Path, tool: str, words: tuple[str, ...]) -> None:
    earlier = contents(folder / "ckpt")
    (ended,) = run_tool(tool, *words, cwd=folder)
    assert ended.code == 2, ended.stderr
    assert "Choose another --out" in ended.last_line and "Traceback" not in ended.stderr
    assert contents(folder / "ckpt") == earlier
