"""The recipe of the published table, on stand-ins of its files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from evals.attitude_key import CAMI, MICA4
from evals.choice_subjects import CEVAL_PAPER, CMMLU_PAPER
from evals.published import read_published
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer
from tests.evals.entity_samples import write_sample
from tests.small_base import write_small_base
from tests.tools.in_child import TOOLS, run_tool

RECIPE = TOOLS.parent / "configs" / "paper_evaluation.yaml"
QUESTION = ["正常体温约为多少？", "34℃", "37℃", "39℃", "41℃", "B"]


def write_table(path: Path, columns: list[str], rows: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *([str(row), *QUESTION] for row in range(rows))])


def write_lines(path: Path, *records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that chats, and at each path of the recipe a file of its kind."""
    base, data = write_small_base(tmp_path / "model", context=1024), tmp_path / "data"
    tokenizer = Tokenizer.load(base)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(base)
    for subject in CEVAL_PAPER:
        for split, rows in (("dev", 5), ("val", 2)):
            write_table(data / f"ceval/{split}/{subject}_{split}.csv", ["id", "question", *"ABCD", "answer"], rows)
    for subject in CMMLU_PAPER:
        for split, rows in (("dev", 5), ("test", 2)):
            write_table(data / f"cmmlu/{split}/{subject}.csv", ["", "Question", *"ABCD", "Answer"], rows)
    asked, *options, answer = QUESTION
    letters = dict(zip("ABCD", options, strict=True))
    write_lines(data / "medqa/test.jsonl", {"question": asked, "options": letters, "answer_idx": answer})
    page = {"answer_1": "多休息，多喝水。", "answer_2": "请到呼吸内科就诊。"}
    page |= {f"{name}_{number}": "" for name in ("specialty", "adopted") for number in (1, 2)}
    write_lines(data / "chimed/ChiMed.v1.test.json", {"question": "咳嗽三天怎么办？", **page})
    for name, path in (("ccks2019", "ccks2019/subtask1_test_set_with_answer.json"), ("chimst", "chimst/test.jsonl")):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        write_sample(data / path, name)
    (data / "mc").mkdir()
    turns = [
        "id\t1\tdepartment\t眼科\tdisease\t结膜炎",
        "P\t眼睛发红。\t1",
        "D\t多久了？\t0",
        "P\t两天。\t0",
        "D\t请来查一下。\t2",
    ]
    (data / "mc/test.dialog").write_text("\n".join(turns) + "\n\n", encoding="utf-8")
    for key, name in ((CAMI, "cami"), (MICA4, "mica4")):
        statements = [f"第{number}句话。" for number in range(1, 1 + len(key.subscales))]
        (data / f"{name}.json").write_text(json.dumps(statements, ensure_ascii=False), encoding="utf-8")
    return tmp_path


def test_every_task_of_the_recipe_is_built_and_every_published_column_has_its_row(folder: Path) -> None:
    (ended,) = run_tool("evaluate_model", "--config", RECIPE, "--model", "model", "--dry-run", cwd=folder)
    assert ended.code == 0, ended.stderr
    labels = [line.split()[1].rstrip(",") for line in ended.stdout.splitlines() if line.startswith("== ")]
    published = {task for column in read_published().columns for task in column.beside}
    assert published <= set(labels)
    assert {"cami", "cami-paper", "mica4", "mica4-paper", "ceval-5-shot", "cmmlu-5-shot"} == set(labels) - published
    for asked in (
        "下面是一道关于",
        "抽取下面文本中的",
        "咳嗽三天怎么办？",
        "[bot]:多久了？",
        "temperature: 1.0",
        "top_p: 0.85",
    ):
        assert asked in ended.stdout, asked
    assert (ended.stdout.count("\nmode: paper\n"), ended.stdout.count("\nprotocol: paper\n")) == (4, 5)
    assert not (folder / "ckpt").exists()


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "data" / "chimst" / "test.jsonl").unlink()
    (ended,) = run_tool("evaluate_model", "--config", RECIPE, "--model", "model", cwd=folder)
    assert ended.code == 2 and "data/chimst/test.jsonl is not there" in ended.last_line
