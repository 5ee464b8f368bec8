"""What users get wrong with multiple choice: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`, where `tuned` is what fine-tuning has left.
"""

from __future__ import annotations

from pathlib import Path

from tests.evals.choice_samples import SEVERAL, write_ceval, write_cmb, write_cmexam, write_medqa
from tests.tools.mistakes import Mistake


def write_questions(folder: Path) -> None:
    write_ceval(folder / "ceval")
    write_medqa(folder / "medqa.jsonl")
    write_cmexam(folder / "several.csv", SEVERAL)
    write_cmb(folder / "test.json", folder / "answers.json")


def choose(task: str) -> Mistake:
    """An evaluation in one task."""
    return Mistake("evaluate_model", ("--model", "tuned", "--tasks", task, "--out", "new"), write_questions)


MISTAKES_CHOICE: dict[str, Mistake] = {
    "a protocol that has no such task": choose("medqa=medqa.jsonl,protocol=lm-eval"),
    "a subject that is not there": choose("ceval=ceval,subjects=clinical_medecine"),
    "a split whose answers were withheld": choose("ceval=ceval,split=test"),
    "a folder without the split": choose("cmmlu=ceval/dev"),
    "more exemplars than dev has": choose("ceval=ceval,shots=9"),
    "exemplars for a prompt that shows none": choose("medqa=medqa.jsonl,protocol=paper,shots=5"),
    "questions whose answers lie in another file": choose("cmb=test.json"),
    "questions in another dataset's format": choose("cmexam=medqa.jsonl"),
    "only questions with several right options, one letter each": choose("cmexam=several.csv"),
}
