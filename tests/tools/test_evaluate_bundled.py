"""Evaluation without flags: every bundled task is asked of whatever training has left, and the table names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer
from samples.bundle import bundled_tasks, sample_folder
from tests.small_base import write_small_base
from tests.tools.in_child import Ended, run_tool

LABELS = ["choice", "entities", "questions", "qa", "dialogue", "attitudes", "perplexity"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh weights as pre-training leaves them, and with a template as fine-tuning does."""
    folder = tmp_path_factory.mktemp("bundled")
    for stage in ("pretrain", "sft"):
        base = write_small_base(folder / "ckpt" / stage, context=256)
        (base / "MODEL_COMPLETE").write_text(json.dumps({"schema": 1, "step": 1, "stage": stage, "files": {}}))
    tokenizer = Tokenizer.load(base)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(base)
    return folder


def evaluate(folder: Path, *words: object) -> Ended:
    (ended,) = run_tool("evaluate_model", "--limit", 2, *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    return ended


def test_without_flags_the_newest_model_is_asked_every_bundled_task(folder: Path) -> None:
    said = evaluate(folder)
    assert "No --tasks: these are the bundled questions." in said.stderr + said.stdout
    rows = [line.split() for line in said.stdout.splitlines()]
    assert rows[0][-1] == "sft"
    assert [row[0] for row in rows[1 : 1 + len(LABELS)]] == LABELS
    report = json.loads((folder / "ckpt" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert [section["label"] for section in report["sections"]] == LABELS
    for section in report["sections"]:
        assert section["entries"][0]["items"] == 2


def test_what_would_be_asked_is_shown_and_nothing_is_left_behind(folder: Path) -> None:
    said = evaluate(folder, "--dry-run", "--out", "dry", "--model", "ckpt/pretrain", "ckpt/sft").stdout
    for wording in ("抽取病历中的疾病、症状、检查和药物，每行一个。\n", "问题：", "患者：", "同意程度", "\n答："):
        assert wording in said
    assert not (folder / "dry").exists()


def remains(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if ".said" not in path.as_posix()}


@pytest.mark.parametrize("there", [".", "ckpt", "ckpt/evaluation"])
def test_a_refused_command_takes_back_what_it_has_made(tmp_path: Path, there: str) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = remains(tmp_path)
    (ended,) = run_tool("evaluate_model", cwd=tmp_path)
    assert ended.code == 2 and ended.last_line.startswith("There is no finished model in ckpt/ppo, "), ended.stderr
    assert remains(tmp_path) == before


@pytest.mark.parametrize("name", ["sample/train.jsonl", "responses.jsonl"])
def test_what_was_there_before_or_came_of_work_stays_with_its_sample(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    if name.startswith("sample"):
        (run / "sample").mkdir(parents=True)
        (run / name).touch()
    with pytest.raises(InputError, match="refused"), sample_folder(run, is_dry=False) as folder:
        folder.mkdir(exist_ok=True)
        (run / name).write_text("1")
        raise InputError("refused")
    assert (run / name).read_text() == "1" and folder.is_dir()


def test_a_reward_model_adds_its_row(tmp_path: Path) -> None:
    tasks = bundled_tasks(tmp_path, with_reward=True)
    assert tasks[: len(LABELS)] == bundled_tasks(tmp_path, with_reward=False)
    assert [task.split("=")[0] for task in tasks[len(LABELS) :]] == ["reward"]
