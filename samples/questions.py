"""Questions whose right answers the facts know, and the score of a text against them.

A question is the first user turn of a held-out conversation about a department or a drug. An answer is right when it
names something that is accepted, and nothing of that kind that is not: listing every department earns nothing. What an
answer advises against ("高钾血症患者不宜用缬沙坦") is not counted as named.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from engine.intervals import wilson_interval
from model.chat import Message
from samples.dialogues import Dialogue
from samples.knowledge import Knowledge

KINDS = ("department", "drug")
REFUSALS = ("不宜", "不能", "不可", "不要", "不用", "不适合", "不建议", "避免", "避用", "禁用", "慎用")
CLAUSE = re.compile(r"[。；！？，,;!?\n]")


@dataclass(frozen=True)
class Question:
    """One question.

    kind: what an answer should name.
    accepted: names of which a right answer gives one or more.
    forbidden: drugs that this patient must not have.
    """

    id: str
    kind: str
    messages: tuple[Message, ...]  # the last one is the user's
    accepted: tuple[str, ...]
    forbidden: tuple[str, ...] = ()

    @property
    def condition(self) -> str:
        """The id of the condition that it is about: department/<condition>/03, drug/<condition>.<purpose>/03."""
        return self.id.split("/")[1].split(".")[0]


@dataclass(frozen=True)
class Score:
    """How many questions of a kind were answered right.

    chance: expected share of right answers of somebody who names one of its kind at random, all equally likely.
    """

    kind: str
    right: int
    wrong: int  # names something that is not accepted
    silent: int  # names nothing
    chance: float

    @property
    def count(self) -> int:
        return self.right + self.wrong + self.silent

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the share of right answers (Wilson 1927)."""
        return wilson_interval(self.right / self.count, self.count)

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.right / self.count:.0%}, 95% interval {low:.0%} to {high:.0%}; chance {self.chance:.1%}"
        return f"Right {self.kind}: {self.right} of {self.count} ({share})"


def questions_of(dialogues: Iterable[Dialogue]) -> list[Question]:
    """The keyed questions that open these conversations, each once; those that no name answers are left out."""
    questions: dict[str, Question] = {}
    for dialogue in dialogues:
        if dialogue.kind in KINDS and dialogue.accepted:
            opening = dialogue.messages[:-1]  # both kinds are one exchange
            question = Question(dialogue.id, dialogue.kind, opening, dialogue.accepted, dialogue.forbidden)
            questions.setdefault(dialogue.question, question)
    return list(questions.values())


def write_questions(file: Path, dialogues: Iterable[Dialogue]) -> list[Question]:
    """Write the keyed questions of these conversations, an object a line; returns what was written."""
    questions = questions_of(dialogues)
    lines = (json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions)
    file.write_text("".join(lines), encoding="utf-8")
    return questions


def names_of(knowledge: Knowledge) -> dict[str, tuple[str, ...]]:
    """All that an answer may name, by kind of question."""
    return {"department": knowledge.departments, "drug": tuple(drug.name for drug in knowledge.drugs)}


def named(answer: str, names: Sequence[str]) -> set[str]:
    """The names that an answer gives without advising against them; the longest where one holds another."""
    pattern = one_of(tuple(names))
    clauses = (clause for clause in CLAUSE.split(answer) if not any(word in clause for word in REFUSALS))
    return {name for clause in clauses for name in pattern.findall(clause)}


@cache
def one_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the names, the longest that there is."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def score_answers(
    questions: Sequence[Question], answers: Sequence[str], names: Mapping[str, Sequence[str]]
) -> list[Score]:
    """Scores by kind, in the order of KINDS; a kind that was not asked is left out."""
    scores = []
    for kind in KINDS:
        given = [(q, named(text, names[kind])) for q, text in zip(questions, answers, strict=True) if q.kind == kind]
        if given:
            right = sum(bool(found) and found <= set(question.accepted) for question, found in given)
            silent = sum(not found for _, found in given)
            chance = sum(len(question.accepted) for question, _ in given) / len(given) / len(names[kind])
            scores.append(Score(kind, right, len(given) - right - silent, silent, chance))
    return scores
