"""Pre-training documents, conversations and questions from the bundled facts.

    python samples/render.py OUT_DIR    writes OUT_DIR/{train,held_out}.jsonl, the documents, and
                                        OUT_DIR/dialogues/{train,held_out,questions}.jsonl,
                                        OUT_DIR/preferences/{train,held_out}.jsonl, comparisons of answers,
                                        OUT_DIR/prompts/{train,held_out}.jsonl, questions with keys, and
                                        OUT_DIR/evaluation/, what models are evaluated on

A document is a function of its id alone ("case_form/hypertension/03"): the id seeds every choice and decides the split.
Held-out documents are combinations of facts, patients and wordings that training never shows; the facts recur.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

if not __package__:  # run as a script: the repository's root, which holds this package, is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from samples.dialogues import write_dialogues
from samples.draw import Draw
from samples.evaluation import write_evaluation
from samples.facts import case_facts, condition_facts, drug_facts
from samples.knowledge import Condition, Knowledge, load_knowledge
from samples.patients import draw_patient
from samples.preferences import write_preferences, write_prompts
from samples.questions import write_questions
from samples.sheets import Facts, load_sheets

HELD_OUT_FRACTION = 0.045

# Copies of each kind: cases differ by patient, so there are many; the rest restates the same facts in other words.
CONDITION_COPIES = {"encyclopedia": 2, "prevention": 2, "nursing": 1}
CASE_COPIES = {"case_form": 4, "case_story": 3, "follow_up": 2, "triage": 2}
DRUG_SHEET_COPIES = 2
MEDICATION_COPIES = 1


@dataclass(frozen=True)
class Document:
    id: str  # kind/subject/copy
    kind: str
    text: str


def render_pretraining(knowledge: Knowledge) -> tuple[list[Document], list[Document]]:
    """All documents, (train, held_out), each in the order of the facts; no two have the same text."""
    sheets = load_sheets()
    train: list[Document] = []
    held_out: list[Document] = []
    for document_id, kind, facts in plan(knowledge):
        document = Document(document_id, kind, sheets[kind].fill(facts, Draw(document_id)))
        is_held_out = Draw(f"split/{document_id}").chance(HELD_OUT_FRACTION)
        (held_out if is_held_out else train).append(document)
    return train, held_out


def write_pretraining(directory: Path, knowledge: Knowledge) -> dict[str, list[Document]]:
    """Write `train.jsonl` and `held_out.jsonl`, one object a line with id, kind and text; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = render_pretraining(knowledge)
    splits = {"train": train, "held_out": held_out}
    for name, documents in splits.items():
        lines = (json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return splits


def plan(knowledge: Knowledge) -> Iterator[tuple[str, str, Facts]]:
    """Every document to write: its id, its kind and the facts it may use."""
    for condition in knowledge.conditions:
        for document_id, kind in _ids(CONDITION_COPIES, condition.id):
            draw = Draw(f"facts/{document_id}")
            facts = condition_facts(condition, knowledge, draw)
            yield document_id, kind, facts | _one_drug(condition, knowledge, draw)
        for document_id, kind in _ids(CASE_COPIES, condition.id):
            draw = Draw(f"facts/{document_id}")
            patient = draw_patient(condition, knowledge, draw)
            yield document_id, kind, case_facts(condition, patient, knowledge, draw)
        for therapy in (*condition.therapies, *condition.second_line):
            for drug_id in therapy.drugs:
                for document_id, kind in _ids({"medication": MEDICATION_COPIES}, f"{condition.id}.{drug_id}"):
                    draw = Draw(f"facts/{document_id}")
                    facts = condition_facts(condition, knowledge, draw, part=True)
                    facts |= drug_facts(knowledge.drug(drug_id), knowledge, draw)
                    yield document_id, kind, facts | {"purpose": therapy.purpose}
    for drug in knowledge.drugs:
        for document_id, kind in _ids({"drug_sheet": DRUG_SHEET_COPIES}, drug.id):
            yield document_id, kind, drug_facts(drug, knowledge, Draw(f"facts/{document_id}"))


def _one_drug(condition: Condition, knowledge: Knowledge, draw: Draw) -> Facts:
    therapy = draw.choice(condition.therapies)
    drug = knowledge.drug(draw.choice(therapy.drugs))
    return drug_facts(drug, knowledge, draw) | {"purpose": therapy.purpose}


def _ids(copies: dict[str, int], subject: str) -> Iterator[tuple[str, str]]:
    for kind, count in copies.items():
        yield from ((f"{kind}/{subject}/{copy:02d}", kind) for copy in range(count))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python samples/render.py OUT_DIR", file=sys.stderr)
        return 2
    directory, knowledge = Path(arguments[0]), load_knowledge()
    for name, documents in write_pretraining(directory, knowledge).items():
        characters = sum(len(document.text) for document in documents)
        print(f"{name}: {len(documents)} documents, {characters} characters")
    splits = write_dialogues(directory / "dialogues", knowledge)
    for name, dialogues in splits.items():
        characters = sum(len(message.content) for dialogue in dialogues for message in dialogue.messages)
        print(f"dialogues/{name}: {len(dialogues)} conversations, {characters} characters")
    questions = write_questions(directory / "dialogues" / "questions.jsonl", splits["held_out"])
    print(f"dialogues/questions: {len(questions)} questions with keys")
    for name, comparisons in write_preferences(directory / "preferences", knowledge).items():
        print(f"preferences/{name}: {len(comparisons)} comparisons")
    for name, prompts in write_prompts(directory / "prompts", knowledge).items():
        print(f"prompts/{name}: {len(prompts)} questions with keys")
    for name, count in write_evaluation(directory / "evaluation", knowledge).items():
        print(f"evaluation/{name}: {count} items")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
