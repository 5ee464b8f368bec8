"""What users get wrong with evaluations, whatever the task: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`: `tuned` is what fine-tuning has left, and `judge` a reward model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tools.mistakes import Mistake
from tests.tools.mistakes_rejection import after

QA = "qa=chats.jsonl,max_new_tokens=4"
ASKED = "new/tuned/qa/responses-0.jsonl"


def evaluate(*words: object, model: str = "tuned", **how: Any) -> Mistake:
    """An evaluation with these words behind it."""
    return Mistake("evaluate_model", ("--model", model, "--out", "new", *words), **how)


def ask(task: str, **how: Any) -> Mistake:
    """In one task."""
    return evaluate("--tasks", task, **how)


def spoil_a_response(folder: Path) -> None:
    after(ask(f"{QA},limit=2"))(folder)
    path = folder / "new" / "tuned" / "qa" / "responses.jsonl"
    path.write_text("{}\n" + path.read_text())


MISTAKES_EVALUATION: dict[str, Mistake] = {
    "a task that does not exist": ask("ccks-2019=notes.json"),
    "an option that a task does not have": ask(f"{QA},shot=5"),
    "a task's option out of its range": ask(f"{QA},limit=0"),
    "a word that is no task": ask(f"{QA},plain"),
    "a task in a recipe without its name": evaluate(
        *("--config", "mine.yaml"), spoil={"mine.yaml": "tasks: [{path: chats.jsonl}]\n"}
    ),
    "a task without its files": ask("cmmlu"),
    "files of a task that are not there": ask("cmmlu=data/cmlu"),
    "two tasks of one name": evaluate("--tasks", QA, f"{QA},limit=3"),
    "two models of one name": Mistake("evaluate_model", ("--model", "tuned", "./tuned", "--tasks", QA)),
    "no model to evaluate": Mistake("evaluate_model", ("--tasks", QA)),
    "a reward model to be evaluated": ask(QA, model="judge"),
    "a model to be evaluated without its tokenizer": ask(QA, model="base", spoil={"base/*token*": None}),
    "messages for a model without a chat template": ask(f"{QA},prompting=chat", model="chat-base"),
    "responses in --out that were asked otherwise": ask(f"{QA},limit=3", spoil=after(ask(f"{QA},limit=2"))),
    "responses in --out that nobody knows of": ask(QA, spoil={ASKED: ""}),
    "a line among the responses that is none": ask(f"{QA},limit=2", spoil=spoil_a_response),
}
