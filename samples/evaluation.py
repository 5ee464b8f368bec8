"""Files to evaluate on: held-out questions, notes and conversations in the shapes that the readers of `evals` take.

They come from the same facts and wordings as the conversations to train on, by the same split, in more copies: what
would be held out from training is asked here, and nothing else. So each fact is taught, and no question, note or first
turn of a conversation is.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from model.chat import Message
from samples.dialogues import Dialogue, render_plan
from samples.draw import Draw
from samples.knowledge import Knowledge
from samples.scripts import Script, load_scripts
from samples.sheets import Items
from samples.topics import Topic

# As `samples.dialogues.COPIES`: enough for intervals that tell models apart.
COPIES = {
    "department": 12,
    "drug": 6,
    "choice": 8,
    "entities": 12,
    "disease": 6,
    "advice": 6,
    "urgent": 6,
    "consultation": 8,
    "warning": 1,
    "medicine": 6,
}
ATTITUDES = Path(__file__).parent / "attitudes.json"
_SUBJECT = re.compile("关于(.+)的单选题")
_QUESTION = "问题："
_ASKED_FOR = {"department": "科室", "disease": "诊断", "drug": "用药", "avoided": "禁忌"}
# The types of entities, and the facts that each mention of one comes from.
_MENTIONS = {"疾病": ("name",), "症状": ("main", "more"), "检查": ("exams",), "药物": ("taken",)}
# Around a mention while a note is written: what opens it tells its type. No text holds such characters.
_OPEN, _CLOSE = "\ue000\ue001\ue002\ue003", "\ue00f"
_MARKED = re.compile(f"([{_OPEN}])([^{_CLOSE}]*){_CLOSE}")


@dataclass(frozen=True)
class Choice:
    """A question with one right option, in the fields of CMB-Exam."""

    id: str
    exam_type: str  # what is asked for; accuracy is told by it
    exam_subject: str
    question_type: str
    question: str
    option: dict[str, str]  # A: text, ...
    answer: str  # the letter


@dataclass(frozen=True)
class Mention:
    type: str
    mention: str
    start: int
    end: int  # exclusive


@dataclass(frozen=True)
class Note:
    """A case note and every entity in it, in the order of the text."""

    id: str
    text: str
    entities: tuple[Mention, ...]


@dataclass(frozen=True)
class Talk:
    """A conversation, of which the last answer is to be given."""

    id: str
    kind: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class EvaluationFiles:
    """What is asked. qa: conversations of one question; dialogue: of several."""

    choice: list[Choice]
    entities: list[Note]
    qa: list[Talk]
    dialogue: list[Talk]


def render_evaluation(knowledge: Knowledge) -> EvaluationFiles:
    """All of it, each list in the order of the facts; no two questions, notes or conversations are the same."""
    files, script = EvaluationFiles([], [], [], []), load_scripts()["entities"]
    asked: set[str] = set()
    for dialogue, topic, is_held_out in render_plan(knowledge, COPIES):
        if not is_held_out or dialogue.question in asked:
            continue
        asked.add(dialogue.question)
        if dialogue.kind == "choice":
            files.choice.append(_choice(dialogue))
        elif dialogue.kind == "entities":
            note = _note(dialogue, topic, script)
            if note.text not in asked:
                asked.add(note.text)
                files.entities.append(note)
        else:
            turns = sum(message.role == "user" for message in dialogue.messages)
            (files.dialogue if turns > 1 else files.qa).append(Talk(dialogue.id, dialogue.kind, dialogue.messages))
    return files


def write_evaluation(directory: Path, knowledge: Knowledge) -> dict[str, int]:
    """Write `choice`, `entities`, `qa` and `dialogue` (.jsonl, an object a line) and `attitudes.json`.

    Returns:
        how many there are in each, by the file's name without its suffix.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = render_evaluation(knowledge)
    counts = {}
    for name, items in vars(files).items():
        (directory / f"{name}.jsonl").write_text(_lines(items), encoding="utf-8")
        counts[name] = len(items)
    scale = ATTITUDES.read_bytes()
    (directory / ATTITUDES.name).write_bytes(scale)
    return counts | {ATTITUDES.stem: len(json.loads(scale)["items"])}


def _choice(dialogue: Dialogue) -> Choice:
    """The parts of a question in the prompt of `phrases/dialogue/choice.yaml`."""
    header, question, _, *options = dialogue.question.split("\n")
    subject = _SUBJECT.search(header)
    assert subject and question.startswith(_QUESTION)
    texts = dict(option.split(".", 1) for option in options)
    return Choice(
        dialogue.id,
        _ASKED_FOR[dialogue.id.split("/")[-1]],
        subject[1],
        "单项选择题",
        question.removeprefix(_QUESTION),
        texts,
        dialogue.messages[-1].content[0],
    )


def _note(dialogue: Dialogue, topic: Topic, script: Script) -> Note:
    """The note below the instruction, with the places of its entities: it is written once more with these marked."""
    facts = dict(topic.facts)
    for opening, names in zip(_OPEN, _MENTIONS.values(), strict=True):
        facts |= {name: _mark(facts[name], opening) for name in names}
    marked = replace(dialogue, messages=script.fill(facts, Draw(dialogue.id))).question.split("\n", 1)[1]
    types = dict(zip(_OPEN, _MENTIONS, strict=True))
    text, mentions, read = "", [], 0
    for found in _MARKED.finditer(marked):
        text += marked[read : found.start()]
        mentions.append(Mention(types[found[1]], found[2], len(text), len(text) + len(found[2])))
        text, read = text + found[2], found.end()
    text += marked[read:]
    assert text == dialogue.question.split("\n", 1)[1], dialogue.id
    return Note(dialogue.id, text, tuple(mentions))


def _mark(fact: str | Items, opening: str) -> str | Items:
    if isinstance(fact, str):
        return f"{opening}{fact}{_CLOSE}"
    return Items(f"{opening}{item}{_CLOSE}" for item in fact)


def _lines(items: Iterable[Any]) -> str:
    return "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
