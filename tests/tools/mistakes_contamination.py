"""What users get wrong with training texts in which test items are looked for: one mistake a row of docs/errors.md."""

from __future__ import annotations

from tests.tools.mistakes import Mistake
from tests.tools.mistakes_evaluation import QA, evaluate

MISTAKES_CONTAMINATION: dict[str, Mistake] = {
    "training texts to look through that are not there": evaluate("--tasks", QA, "--contamination", "data/corpsu"),
    "training texts to look through of an unknown kind": evaluate(
        "--tasks", QA, "--contamination", "tuned/model.safetensors"
    ),
    "a stretch of no letters": evaluate("--tasks", QA, "--contamination", "chats.jsonl", "--gram", 0),
}
