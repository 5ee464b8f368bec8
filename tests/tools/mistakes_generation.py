"""What users get wrong with open questions and dialogues: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`, where `tuned` is what fine-tuning has left.
"""

from __future__ import annotations

import sys

from tests.tools.mistakes import Mistake, Spoiled

QA = {"qa.jsonl": '{"question": "头晕怎么办？", "answer": "多休息。"}\n{"question": "牙痛？", "answer": "看牙科。"}\n'}
DIALOGUE = "id\t1\tdepartment\t内科\tdisease\t-\nP\t头晕。\t1\n"
CMEDQA2 = {
    "cMedQA2/question.csv": "question_id,content\n1,头晕？\n",
    "cMedQA2/test_candidates.txt": "question_id,ans_id,cnt,label\n1,1,0,1\n",
}


def ask(task: str, files: Spoiled | None = None, **how: object) -> Mistake:
    """An evaluation in one task."""
    words = ("--model", "tuned", "--tasks", task, "--out", "new")
    return Mistake("evaluate_model", words, {**QA, **(files or {})}, **how)  # type: ignore[arg-type]


def hide_sacrebleu() -> None:
    sys.modules["sacrebleu"] = None  # type: ignore[assignment]


def hide_jieba() -> None:
    sys.modules["jieba"] = None  # type: ignore[assignment]


MISTAKES_GENERATION: dict[str, Mistake] = {
    "shots without exemplars": ask("qa=qa.jsonl,shots=5"),
    "fewer exemplars than shots": ask("qa=qa.jsonl,shots=5,exemplars=qa.jsonl"),
    "nothing left but exemplars": ask("qa=qa.jsonl,shots=2,exemplars=qa.jsonl"),
    "questions of another form than the task's": ask("chimed=qa.jsonl"),
    "questions without answers": ask(
        "qa=asked.jsonl", {"asked.jsonl": '{"messages": [{"role": "user", "content": "头晕？"}]}\n'}
    ),
    "a broken line among test questions": ask(
        "qa=cut.jsonl", {"cut.jsonl": '{"question": "头晕？", "answer": "多休息。"\n'}
    ),
    "conversations named as a .dialog file": ask("mc-dialogue=qa.jsonl"),
    "a line of a .dialog file that no one speaks": ask(
        "mc-dialogue=talk.dialog", {"talk.dialog": DIALOGUE + "医生\t多休息。\n"}
    ),
    "cMedQA2 without its answers": ask("cmedqa2=cMedQA2", CMEDQA2),
    "texts scored without sacrebleu": ask("qa=qa.jsonl", before=hide_sacrebleu),
    "words of jieba where it is not installed": ask("qa=qa.jsonl,tok=jieba", before=hide_jieba),
}
