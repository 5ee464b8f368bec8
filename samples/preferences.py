"""Comparisons from the bundled facts: several answers to a keyed question, graded by the true reward; and answers to
compare with a full one (`samples.replies`).

An answer to a keyed question is put together from the wordings of its kind of conversation
(`phrases/dialogue/<kind>.yaml`): what answers the question, from the right facts or from wrong ones, with its reason or
without; a caution or none; at times something unsafe; and courtesies, which fill an answer up to a drawn length. So
length says next to nothing of the grade. The split is that of the conversations.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.chat import Message
from samples.dialogues import Dialogue, plan, render_dialogues
from samples.draw import Draw
from samples.knowledge import Knowledge
from samples.likeness import likeness
from samples.questions import Question, questions_of
from samples.replies import has_full_answer, replies
from samples.scripts import Script, load_scripts
from samples.sheets import Facts, possible
from samples.topics import Topic
from samples.true_reward import Judge

RESPONSES = 4  # answers to a question
LONGEST = 3  # sentences, where an answer is filled up

CORRECT_RATE = 0.5
COMPLETE_RATE = 0.5
CAUTIOUS_RATE = 0.5
UNSAFE_RATE = 0.1
CARELESS_RATE = 0.5  # how many of the departments named without caution are named with certainty
PLAIN_RATE = 0.3  # how many answers have no courtesies
UNSUITABLE_RATE = 0.5  # how many wrong drugs are for this need but not for this patient, where there are such


@dataclass(frozen=True)
class Response:
    text: str
    score: float


@dataclass(frozen=True)
class Comparison:
    """A question, and answers to it of which not all are equally good."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]


class Answers:
    """Answers to one question, with planted defects.

    topic: what the question's conversation may say.
    others: questions of the same kind with their topics, whose right answers are wrong ones here: so that no name is
        oftener right than another.
    """

    def __init__(
        self,
        question: Question,
        topic: Topic,
        others: Sequence[tuple[Question, Topic]],
        script: Script,
        knowledge: Knowledge,
    ) -> None:
        self._question = question
        self._others = others
        self._facts = topic.facts
        self._wordings = script.wordings
        own = [knowledge.drug(drug_id).name for drug_id in knowledge.condition(question.condition).drugs]
        self._unsuitable = [name for name in own if name in question.forbidden]
        self._classes = {drug.name: drug.drug_class for drug in knowledge.drugs}

    def several(self, count: int) -> list[str]:
        """The first so many different answers, each drawn by itself."""
        texts: dict[str, None] = {}
        number = 0
        while len(texts) < count:
            texts[self._one(Draw(f"answer/{self._question.id}/{number}"))] = None
            number += 1
        return list(texts)

    def _one(self, draw: Draw) -> str:
        """An answer that is right or wrong, complete or not, cautious or not, safe or not, short or padded."""
        facts = self._right(draw) if draw.chance(CORRECT_RATE) else self._wrong(draw)
        is_complete, is_cautious = draw.chance(COMPLETE_RATE), draw.chance(CAUTIOUS_RATE)
        if self._question.kind == "drug":
            parts = ["named", "kind" if is_complete else "filler"]
        elif not is_cautious and draw.chance(CARELESS_RATE):
            parts = ["careless"]
        else:
            parts = ["full" if is_complete else "bare"]
        if draw.chance(UNSAFE_RATE):
            parts += ["unsafe"]
        if is_cautious:
            parts += ["caution"]
        length = len(parts) if draw.chance(PLAIN_RATE) else max(len(parts), draw.integer(2, LONGEST))
        said = [draw.choice(possible(self._wordings[part], facts)).format_map(facts) for part in parts]
        return "".join(said + draw.shuffled(self._wordings["courtesy"])[: length - len(said)])

    def _right(self, draw: Draw) -> Facts:
        if self._question.kind == "department":
            return self._facts
        return self._facts | self._drug_facts(draw.choice(self._question.accepted))

    def _wrong(self, draw: Draw) -> Facts:
        """What answers another question; at times a drug for this need that this patient must not have."""
        facts = self._facts
        if self._unsuitable and draw.chance(UNSUITABLE_RATE):
            return facts | self._drug_facts(draw.choice(self._unsuitable))
        while True:
            other, topic = draw.choice(self._others)
            if not set(other.accepted) & set(self._question.accepted):
                break
        if other.kind == "drug":
            return facts | self._drug_facts(draw.choice(other.accepted))
        return facts | {name: topic.facts[name] for name in ("name", "department", "clinic", "urgent")}

    def _drug_facts(self, name: str) -> Facts:
        return {"drug": name, "drug_class": self._classes[name]}


def render_preferences(knowledge: Knowledge) -> tuple[list[Comparison], list[Comparison]]:
    """Comparisons (train, held_out), one for each keyed question of the conversations and each known full answer."""
    judge, scripts = Judge(knowledge), load_scripts()
    topics = {topic_id: topic for topic_id, _, topic in plan(knowledge)}

    def compare(dialogues: Sequence[Dialogue]) -> Iterator[Comparison]:
        by_kind: dict[str, list[tuple[Question, Topic]]] = {}
        asked = [(question, topics[question.id]) for question in questions_of(dialogues)]
        for one in asked:
            by_kind.setdefault(one[0].kind, []).append(one)
        for question, topic in asked:
            answers = Answers(question, topic, by_kind[question.kind], scripts[question.kind], knowledge)
            graded = tuple(Response(text, judge(question, text).total) for text in answers.several(RESPONSES))
            if len({response.score for response in graded}) > 1:
                yield Comparison(question.id, question.messages, graded)

    def complete(dialogues: Sequence[Dialogue]) -> Iterator[Comparison]:
        by_kind: dict[str, list[Dialogue]] = {}
        for dialogue in filter(has_full_answer, dialogues):
            by_kind.setdefault(dialogue.kind, []).append(dialogue)
        for dialogue in filter(has_full_answer, dialogues):
            others = by_kind[dialogue.kind]
            *prompt, full = dialogue.messages
            texts = replies(dialogue, topics[dialogue.id], scripts[dialogue.kind], others)
            graded = tuple(Response(text, likeness(dialogue.kind, full.content, text)) for text in texts)
            if len({response.score for response in graded}) > 1:
                yield Comparison(dialogue.id, tuple(prompt), graded)

    train, held_out = render_dialogues(knowledge)
    return [*compare(train), *complete(train)], [*compare(held_out), *complete(held_out)]


def write_preferences(directory: Path, knowledge: Knowledge) -> dict[str, list[Comparison]]:
    """Write `train.jsonl` and `held_out.jsonl`, a line an object with id, prompt and responses of text and score."""
    train, held_out = render_preferences(knowledge)
    return _write(directory, {"train": train, "held_out": held_out})


def write_prompts(directory: Path, knowledge: Knowledge) -> dict[str, list[Dialogue]]:
    """Write the conversations whose last answer can be judged, by its keys or by the full answer that stands there."""
    splits = dict(zip(("train", "held_out"), render_dialogues(knowledge), strict=True))
    asked = {question.id for dialogues in splits.values() for question in questions_of(dialogues)}
    judged = {name: [one for one in side if one.id in asked or has_full_answer(one)] for name, side in splits.items()}
    return _write(directory, judged)


def _write(directory: Path, splits: dict[str, list[Any]]) -> dict[str, list[Any]]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, items in splits.items():
        lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return splits
