"""tools/evaluate_model.py: what it prints and leaves, on one rank and two, and when it is stopped."""

from __future__ import annotations

import functools
import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.evals.choice_samples import write_cmmlu, write_medqa
from tests.ranks import PATIENCE
from tests.rlhf.small_reward import write_small_reward_model
from tests.small_base import FINDINGS, small_texts, write_small_base, write_small_conversations, write_small_data
from tests.tools.in_child import TOOLS, hold_generation, run_tool, start_tool
from tests.tools.small_chat import write_small_chat_model

SHORT = ",max_new_tokens=12"
TASKS = ("--tasks", "medqa=medqa.jsonl", f"qa=qa.jsonl{SHORT}", "perplexity=texts.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, a base, a reward model, and files of questions."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_small_chat_model(folder / "chat")
    write_small_base(folder / "base", 256)
    write_small_reward_model(folder / "judge", mean=0.5, std=2.0)
    write_medqa(folder / "medqa.jsonl")
    write_cmmlu(folder / "cmmlu")
    write_small_conversations(folder / "qa.jsonl", 24)
    write_small_data(folder / "texts.jsonl", 6)
    return folder


def kept(folder: Path) -> dict[str, bytes]:
    """All that is kept of the responses, and of what they are worth."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json*") if path.parent != folder
    }


def test_models_are_asked_in_turn_and_a_second_call_asks_nothing(folder: Path) -> None:
    words = ("--model", "chat", "untrained=base", *TASKS, "--out", "first")
    (ended,) = run_tool("evaluate_model", *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    table = ended.stdout.splitlines()
    assert re.fullmatch("task +metric +n +chat +untrained", table[0])
    assert [line.split()[0] for line in table[1:-1]] == ["medqa", "qa", "perplexity"]
    assert table[-1].startswith("first/report.html")
    assert {path.name for path in (folder / "first").iterdir()} == {
        *("chat", "untrained", "report.html", "report.json", "report.md")
    }
    report = json.loads((folder / "first" / "report.json").read_text(encoding="utf-8"))
    assert [about["model"] for about in report["models"]] == ["chat", "untrained"]
    assert "24 of 24 requests" in ended.stderr
    before = kept(folder / "first")
    (again,) = run_tool("evaluate_model", *words, cwd=folder)
    assert again.code == 0 and again.stdout == ended.stdout
    assert "requests" not in again.stderr and kept(folder / "first") == before


def test_a_recipe_says_the_same_as_words(folder: Path) -> None:
    recipe = """
model: [chat]
tasks:
- medqa=medqa.jsonl
- {name: qa, path: qa.jsonl, max_new_tokens: 12}
- perplexity=texts.jsonl
"""
    (folder / "mine.yaml").write_text(recipe)
    (ended,) = run_tool("evaluate_model", "--config", "mine.yaml", "--out", "recipe", cwd=folder)
    assert ended.code == 0, ended.stderr
    (words,) = run_tool("evaluate_model", "--model", "chat", *TASKS, "--out", "words", cwd=folder)
    assert words.code == 0 and kept(folder / "recipe") == kept(folder / "words")


def test_two_ranks_say_what_one_says(folder: Path) -> None:
    words = ("--model", "chat", *TASKS, "reward=qa.jsonl,max_new_tokens=12", "--reward", "judge")
    for world in (1, 2):
        ends = run_tool("evaluate_model", *words, "--out", f"ranks-{world}", cwd=folder, world=world)
        assert [ended.code for ended in ends] == [0] * world, ends[0].stderr
        assert [bool(ended.stdout) for ended in ends] == [True, False][:world]
    one, two = kept(folder / "ranks-1"), kept(folder / "ranks-2")
    assert sorted(one) == sorted(two)
    for name in one:
        if name.endswith("predictions.jsonl"):
            for ours, theirs in zip(one[name].splitlines(), two[name].splitlines(), strict=True):
                a, b = json.loads(ours), json.loads(theirs)
                parts, others = a.pop("parts"), b.pop("parts")
                assert a == b
                for metric, pair in parts.items():
                    assert pair == pytest.approx(others[metric], rel=1e-4, abs=1e-4)


def test_a_report_that_cannot_be_written_ends_every_rank(folder: Path) -> None:
    (folder / "full" / "report.json").mkdir(parents=True)  # a folder where the file should be
    words = ("--model", "chat", "--tasks", "medqa=medqa.jsonl", "--out", "full")
    ends = run_tool("evaluate_model", *words, cwd=folder, world=2)
    assert all(ended.code not in (0, -9) for ended in ends), [ended.stderr for ended in ends]


def test_a_signal_keeps_what_was_answered_and_the_same_command_goes_on(folder: Path) -> None:
    words = ("--model", "chat", "--tasks", "medqa=medqa.jsonl", "qa=qa.jsonl,limit=9,max_new_tokens=200", "--out")
    answers, deadline = folder / "stopped/chat/qa/settings.json", time.monotonic() + PATIENCE
    before = functools.partial(hold_generation, str(answers), 1, "signalled")
    running = start_tool("evaluate_model", *words, "stopped", cwd=folder, before=before)
    while not answers.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    running.signal(0, signal.SIGTERM)
    (folder / "signalled").touch()
    (ended,) = running.wait()
    assert ended.code == 143
    assert ended.last_line == "Stopped. What was answered is kept; the same command goes on."
    assert (folder / "stopped/chat/medqa/responses.jsonl").exists()
    assert not (folder / "stopped/chat/qa/responses.jsonl").exists(), "it must fall among answers to prove anything"
    (ended,) = run_tool("evaluate_model", *words, "stopped", cwd=folder)
    assert ended.code == 0 and "medqa: " not in ended.stderr, ended.stderr
    (unbroken,) = run_tool("evaluate_model", *words, "unbroken", cwd=folder)
    assert unbroken.code == 0 and kept(folder / "stopped") == kept(folder / "unbroken")


def test_a_dry_run_shows_one_whole_prompt_of_each_task_and_writes_nothing(folder: Path) -> None:
    words = ("--model", "chat", "--tasks", "cmmlu=cmmlu,shots=2", f"qa=qa.jsonl{SHORT}", "perplexity=texts.jsonl")
    (ended,) = run_tool("evaluate_model", *words, "--out", "dry", "--dry-run", cwd=folder)
    assert ended.code == 0, ended.stderr
    assert not (folder / "dry").exists()
    assert [line for line in ended.stdout.splitlines() if line.startswith("== ")] == [
        "== cmmlu, asked of chat: 15 choices",
        "== qa, asked of chat: 24 answers",
        "== perplexity, asked of chat: 6 texts to read",
    ]
    assert "[human]:" in ended.stdout and "[bot]:" in ended.stdout
    assert "always A: accuracy" in ended.stdout and "shots: 2" in ended.stdout
    assert small_texts(1)[0] in ended.stdout


def test_training_texts_that_hold_the_questions_are_found(folder: Path) -> None:
    words = ("--model", "chat", "--tasks", "medqa=medqa.jsonl", "--out", "looked", "--contamination")
    (ended,) = run_tool("evaluate_model", *words, "medqa.jsonl", cwd=folder)
    assert ended.code == 0, ended.stderr
    (section,) = json.loads((folder / "looked/report.json").read_text(encoding="utf-8"))["sections"]
    clean = section["entries"][0]["clean"]
    assert clean["flagged"] > 0 and clean["flagged"] + clean["unchecked"] == clean["items"]


def test_the_task_of_the_documentation_is_asked(folder: Path) -> None:
    page = (TOOLS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.+?)```", page, re.DOTALL)
    (folder / "my_tasks.py").write_text(code, encoding="utf-8")
    rows = [{"description": f"{finding}三天", "disease": "感冒"} for finding in FINDINGS]
    (folder / "names.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    words = ("--model", "chat", "--tasks", "my_tasks:names=names.jsonl,limit=4", "--out", "own")
    (ended,) = run_tool("evaluate_model", *words, cwd=folder)
    assert ended.code == 0, ended.stderr
    assert ended.stdout.splitlines()[1].split()[:4] == ["names", "Accuracy", "(%)", "4"]
