"""What users get wrong with entities: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`, where `tuned` is what fine-tuning has left.
"""

from __future__ import annotations

from pathlib import Path

from tests.evals.entity_samples import write_sample
from tests.tools.mistakes import Mistake

MISPLACED = '{"text": "诊断肺炎。", "mention_data": [{"mention": "肺炎", "type": "disease", "offset": "1"}]}\n'


def write_notes(folder: Path) -> None:
    write_sample(folder / "notes.jsonl", "entities")
    write_sample(folder / "cmeee.json", "cmeee")
    (folder / "misplaced.json").write_text(MISPLACED, encoding="utf-8")
    (folder / "written.json").write_text('{"prompt": ["找出疾病。"], "output": ["肺炎 疾病"]}\n', encoding="utf-8")


def extract(task: str) -> Mistake:
    """An evaluation in one task."""
    return Mistake("evaluate_model", ("--model", "tuned", "--tasks", task, "--out", "new"), write_notes)


MISTAKES_ENTITIES: dict[str, Mistake] = {
    "an entity that is not where its file says": extract("cmedqaner=misplaced.json"),
    "entities in another dataset's format": extract("ccks2019=cmeee.json"),
    "exemplars of entities that are asked about": extract("entities=notes.jsonl,shots=3,exemplars=notes.jsonl"),
    "types that leave one of the file out": extract("entities=notes.jsonl,types=疾病+症状"),
    "prompts with answers where texts are scored": extract("chimst=written.json"),
    "paper mode of a dataset that the paper does not have": extract("cmeee=cmeee.json,protocol=paper"),
}
