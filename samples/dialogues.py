"""Conversations from the bundled facts: what a patient asks, what a doctor answers.

As documents are, a conversation is a function of its id alone ("drug/hypertension.降压/03"): the id seeds every choice.
What its first question puts together decides the split, so that no question is on both sides. Held-out questions
combine symptoms, patients and wordings as training never does; the facts that answer them recur there.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from model.chat import Message
from samples.draw import Draw
from samples.knowledge import Knowledge
from samples.scripts import load_scripts
from samples.topics import (
    Topic,
    advice_topic,
    case_topic,
    choice_topics,
    department_topic,
    disease_topic,
    drug_topic,
    entity_topic,
    medicine_topic,
    sort_drugs,
    warning_topic,
)

HELD_OUT_FRACTION = 0.1

# Copies of each kind, for each condition, purpose of its treatment, history that rules a drug out, or drug.
COPIES = {
    "department": 12,
    "disease": 3,
    "advice": 3,
    "urgent": 2,
    "consultation": 4,
    "entities": 4,
    "choice": 1,
    "drug": 6,
    "warning": 1,
    "medicine": 3,
}

_TOPICS = {
    "department": department_topic,
    "disease": disease_topic,
    "advice": advice_topic,
    "urgent": advice_topic,
    "consultation": case_topic,
    "entities": entity_topic,
}


@dataclass(frozen=True)
class Dialogue:
    """A conversation: [system] user assistant user assistant ...

    accepted: for department, disease and drug: what a right first answer names, one or more of it and nothing else of
        its kind.
    forbidden: for drug: drugs that the patient must not have.
    """

    id: str  # kind/subject/copy
    kind: str
    messages: tuple[Message, ...]
    accepted: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """The first user turn."""
        return next(message.content for message in self.messages if message.role == "user")


def render_dialogues(knowledge: Knowledge, is_hurried: bool = False) -> tuple[list[Dialogue], list[Dialogue]]:
    """All conversations, (train, held_out), each in the order of the facts; no two are the same."""
    train: list[Dialogue] = []
    held_out: list[Dialogue] = []
    for dialogue, _, is_held_out in render_plan(knowledge, COPIES, is_hurried):
        (held_out if is_held_out else train).append(dialogue)
    return train, held_out


def render_plan(
    knowledge: Knowledge, copies: Mapping[str, int], is_hurried: bool = False
) -> Iterator[tuple[Dialogue, Topic, bool]]:
    """Conversations of a plan, what each may say, and whether it is held out: with more copies, more of the same.

    Args:
        is_hurried: whether assistants are curt at times; else they answer all that they are asked.
    """
    scripts = load_scripts()
    written: set[tuple[Message, ...]] = set()
    for dialogue_id, kind, topic in plan(knowledge, copies):
        hurry = Draw(f"hurry/{dialogue_id}") if is_hurried else None
        messages = scripts[kind].fill(topic.facts, Draw(dialogue_id), hurry)
        if messages and messages not in written:
            written.add(messages)
            dialogue = Dialogue(dialogue_id, kind, messages, topic.accepted, topic.forbidden)
            yield dialogue, topic, Draw(f"split/{topic.combination or dialogue.question}").chance(HELD_OUT_FRACTION)


def write_dialogues(directory: Path, knowledge: Knowledge) -> dict[str, list[Dialogue]]:
    """Write `train.jsonl` and `held_out.jsonl`, a line an object with id, kind and messages; returns what they hold."""
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = render_dialogues(knowledge, is_hurried=True)
    splits = {"train": train, "held_out": held_out}
    for name, dialogues in splits.items():
        (directory / f"{name}.jsonl").write_text("".join(_lines(dialogues)), encoding="utf-8")
    return splits


def plan(knowledge: Knowledge, copies: Mapping[str, int] = COPIES) -> Iterator[tuple[str, str, Topic]]:
    """Every conversation to write: its id, its kind and what it may say."""

    def ids(kinds: Iterable[str], subject: str) -> Iterator[tuple[str, str]]:
        for kind in kinds:
            yield from ((f"{kind}/{subject}/{copy:02d}", kind) for copy in range(copies.get(kind, 0)))

    for condition in knowledge.conditions:
        for dialogue_id, kind in ids(_TOPICS, condition.id):
            yield dialogue_id, kind, _TOPICS[kind](condition, knowledge, Draw(f"facts/{dialogue_id}"))
        for dialogue_id, kind in ids(("choice",), condition.id):
            for asked, topic in choice_topics(condition, knowledge, Draw(f"facts/{dialogue_id}")):
                yield f"{dialogue_id}/{asked}", kind, topic
        for therapy in condition.therapies:
            subject = f"{condition.id}.{therapy.purpose}"
            for dialogue_id, kind in ids(("drug",), subject):
                yield dialogue_id, kind, drug_topic(condition, therapy, knowledge, Draw(f"facts/{dialogue_id}"))
            for trait in (knowledge.trait(trait_id) for trait_id in condition.backgrounds):
                if sort_drugs(therapy.drugs, (trait,), knowledge)[1] and copies.get("warning"):
                    dialogue_id = f"warning/{subject}/{trait.id}"
                    draw = Draw(f"facts/{dialogue_id}")
                    yield dialogue_id, "warning", warning_topic(condition, therapy, trait, knowledge, draw)
    for drug in knowledge.drugs:
        for dialogue_id, kind in ids(("medicine",), drug.id):
            yield dialogue_id, kind, medicine_topic(drug, knowledge, Draw(f"facts/{dialogue_id}"))


def _lines(dialogues: Iterable[Dialogue]) -> Iterator[str]:
    for dialogue in dialogues:
        record = asdict(dialogue)
        del record["accepted"], record["forbidden"]
        yield json.dumps(record, ensure_ascii=False) + "\n"
