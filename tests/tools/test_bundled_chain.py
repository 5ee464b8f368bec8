"""The jobs behind fine-tuning without flags: each finds what the one before has left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from tests.small_base import write_small_base
from tests.tools.in_child import Ended, run_tool

QUIET = ("--log.tensorboard", "false", "--log.curves", "false")
SHORT = ("--rollout.max_new_tokens", 4, "--eval.max_tokens", 32, "--log.curves", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a template in ckpt/sft, as fine-tuning leaves it, and a reward model in ckpt/rm."""
    folder = tmp_path_factory.mktemp("chain")
    base = write_small_base(folder / "ckpt" / "sft", context=256)
    tokenizer = Tokenizer.load(base)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(base)
    said = job(folder, "rm", "--train.steps", 3, "--eval.max_tokens", 4000, *QUIET)
    (folder / "said").write_text(said.stdout + said.stderr, encoding="utf-8")
    return folder


def job(folder: Path, tool: str, *words: object) -> Ended:
    """The tool's run to its good end."""
    (ended,) = run_tool(tool, *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    return ended


def stage(folder: Path, name: str) -> str:
    return json.loads((folder / "ckpt" / name / "MODEL_COMPLETE").read_text())["stage"]


def test_a_reward_model_is_trained_on_the_bundled_comparisons(folder: Path) -> None:
    said = (folder / "said").read_text(encoding="utf-8")
    assert "No --data: these are the bundled comparisons." in said
    assert "to train on" in said and "held-out accuracy" in said
    assert stage(folder, "rm") == "rm"


def test_ppo_and_rejection_sampling_follow_it(folder: Path) -> None:
    few = ("--rollout.prompts", 8, "--rollout.samples", 2)
    said = job(folder, "ppo", "--reward", "ckpt/rm", "--train.steps", 1, "--log.tensorboard", "false", *few, *SHORT)
    assert "No --data: these are the bundled questions." in said.stderr
    assert stage(folder, "ppo") == "ppo"
    few = ("--rollout.prompts", 16, "--rollout.samples", 2, "--rounds", 1, "--log.tensorboard", "false")
    picks = ("--select.truncated", "true", "--train.epochs", 1)
    job(folder, "rejection", "--reward", "ckpt/rm", *few, *picks, *SHORT)
    assert stage(folder, "rejection") == "rejection"


def test_the_control_needs_no_reward_model(folder: Path) -> None:
    few = ("--rollout.prompts", 8, "--train.steps", 1, "--out", "ckpt/control", "--log.tensorboard", "false")
    job(folder, "ppo", "--reward", "samples.control:shuffled", *few, *SHORT)
    assert stage(folder, "control") == "ppo"


def test_dpo_takes_the_same_comparisons(folder: Path) -> None:
    job(folder, "dpo", "--train.steps", 1, "--eval.max_tokens", 4000, *QUIET)
    assert stage(folder, "dpo") == "dpo"
