"""What users get wrong with compared answers: one mistake a row of docs/errors.md, played as in `mistakes_rm.py`."""

from __future__ import annotations

from typing import Any

from tests.tools.mistakes import Mistake
from tests.tools.mistakes_rm import rm_new
from tests.tools.mistakes_sft import ADVICE, HELLO, records

WORSE = "不用管。"
PAIR = {"prompt": HELLO, "chosen": ADVICE, "rejected": WORSE}


def rm_on(*rows: object, words: tuple[object, ...] = ()) -> Mistake:
    """A run on these records, which ends at the first that compares nothing."""
    return rm_new("--data", "mine.jsonl", "--data.on_error", "fail", *words, spoil={"mine.jsonl": records(*rows)})


def graded(*responses: tuple[str, Any]) -> dict[str, Any]:
    return {"prompt": HELLO, "responses": [{"text": text, "score": score} for text, score in responses]}


def candidate(label: int, question: str) -> dict[str, Any]:
    return {"label": label, "question": question, "answer": ADVICE}


MISTAKES_PREFERENCES = {
    "records that compare no answers": rm_on({"题目": HELLO, "解析": ADVICE}),
    "conversations given as comparisons": rm_new("--data", "chats.jsonl"),
    "comparisons given as conversations": rm_new("--normalise.data", "mine.jsonl", spoil={"mine.jsonl": records(PAIR)}),
    "a text file given as comparisons": rm_new("--data", "book.txt", spoil={"book.txt": HELLO * 10}),
    "prepared data given as comparisons": rm_new("--data", "prepared"),
    "--data.keys maps what comparisons do not have": rm_new("--data.keys", "user=ask", "better=up", "worse=down"),
    "--data.keys without the worse answer": rm_new("--data.keys", "user=ask", "chosen=up"),
    "two answers without a question": rm_on(PAIR, {"chosen": ADVICE, "rejected": WORSE}),
    "a better answer that is also the worse": rm_on(PAIR, {**PAIR, "rejected": ADVICE}),
    "an empty answer among those compared": rm_on(PAIR, {**PAIR, "chosen": " "}),
    "scores that contradict the order": rm_on(PAIR, {**PAIR, "score_chosen": 3, "score_rejected": 4}),
    "compared conversations that part too early": rm_on(
        PAIR, {"chosen": [HELLO, ADVICE, HELLO, ADVICE], "rejected": [HELLO, WORSE, HELLO, WORSE]}
    ),
    "answers of one grade": rm_on(PAIR, graded((ADVICE, 1), (WORSE, 1))),
    "an answer of two grades": rm_on(PAIR, graded((ADVICE, 1), (WORSE, 0), (ADVICE, 2))),
    "a list of one answer": rm_on(PAIR, graded((ADVICE, 1))),
    "a grade that is no number": rm_on(PAIR, graded((ADVICE, "好"), (WORSE, "差"))),
    "a compared answer that does not fit the context": rm_on(PAIR, {**PAIR, "rejected": WORSE * 100}),
    "candidates of which none is better": rm_on(candidate(1, HELLO), candidate(0, "咳嗽怎么办？")),
    "answers to a prompt that nobody can compare": rm_new("--data.max_responses", 1),
    "all compared questions are held out": rm_new("--eval.data", "compared.jsonl"),
}
