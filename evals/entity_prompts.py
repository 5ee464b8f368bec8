"""How entities are asked for, and how the right answer is written: everything that a model is shown.

The wording is the table below and nothing else. Exemplars are texts with their right answers: earlier turns of a
conversation, or sections of one text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from evals.entity_files import Annotated
from evals.entity_mentions import NOTHING, quote
from evals.entity_text import fold
from evals.task import Prompt
from model.chat import Message


@dataclass(frozen=True)
class Wording:
    """answer: its form; words: mention, space, type, as the paper's mode compares them.
    instruction: {types} are the types' names; and_: before the last of them.
    question: a turn of a conversation; section: the same in a plain text, behind the instruction, before the answer.
    """

    answer: Literal["lines", "json", "words"]
    instruction: str
    and_: str = "、"
    question: str = "{instruction}\n文本：{text}"
    section: str = "文本：{text}\n结果：\n"


WORDINGS = {
    "lines": Wording(
        "lines", f"抽取下面文本中的{{types}}，每行一个，写成“类别：名称”，名称照抄原文。没有就写“{NOTHING}”。"
    ),
    # What this project's bundled conversations ask: for models that are trained on such.
    "short": Wording("lines", "抽取病历中的{types}，每行一个。", "和", "{instruction}\n{text}"),
    "json": Wording(
        "json", "抽取下面文本中的{types}，只写 JSON：键是类别，值是名称的列表，名称照抄原文。没有就写 {{}}。"
    ),
    "words": Wording("words", "抽取下面文本中的{types}，每行一个，先写名称，空一格，再写类别。"),
}

PLAIN_STOP = "\n\n"
"""Ends an answer in a plain text, where the next section would begin."""


def ask(
    text: Annotated,
    exemplars: Sequence[Annotated],
    types: Sequence[str],
    wording: Wording,
    prompting: Literal["chat", "plain"],
) -> Prompt:
    """What a model is shown to extract the entities of a text."""
    if prompting == "plain":
        before = [wording.section.format(text=one.text) + write(one, types, wording) for one in exemplars]
        return PLAIN_STOP.join([_instruction(text, types, wording), *before, wording.section.format(text=text.text)])
    turns: list[Message] = []
    for one in exemplars:
        turns += Message("user", _question(one, types, wording)), Message("assistant", write(one, types, wording))
    return (*turns, Message("user", _question(text, types, wording)))


def shown(prompt: Prompt) -> str:
    """A prompt for readers of a report."""
    return prompt if isinstance(prompt, str) else "\n\n".join(message.content for message in prompt)


def write(text: Annotated, types: Sequence[str], wording: Wording) -> str:
    """The right answer: type by type, in the order of the text, each mention once."""
    listed: dict[tuple[str, str], str] = {}
    for entity in sorted(text.entities, key=lambda entity: (types.index(entity.type), entity.start or 0)):
        listed.setdefault((entity.type, fold(entity.mention)), entity.mention)
    if wording.answer == "json":
        mentions: dict[str, list[str]] = {}
        for (kind, _), mention in listed.items():
            mentions.setdefault(kind, []).append(mention)
        return json.dumps(mentions, ensure_ascii=False)
    if wording.answer == "words":
        return "\n".join(f"{mention} {kind}" for (kind, _), mention in listed.items())
    return "\n".join(f"{kind}：{quote(mention)}" for (kind, _), mention in listed.items()) or NOTHING


def choose_exemplars(
    texts: Sequence[Annotated], shots: int, pick: str, seed: int, excluded: Collection[str]
) -> tuple[list[Annotated], int]:
    """Texts to be shown with their answers, and how many were passed over because they are asked about.

    Args:
        pick: first: the first ones; cover: of an order that is drawn, always the first text with the most types that
            are not shown yet, and anew when all are.
        excluded: folded texts that are asked about.
    """
    usable = [text for text in texts if fold(text.text) not in excluded]
    passed_over = len(texts) - len(usable)
    if pick == "first":
        return usable[:shots], passed_over
    random.Random(seed).shuffle(usable)
    kinds = [frozenset(entity.type for entity in text.entities) for text in usable]
    every: frozenset[str] = frozenset().union(*kinds)
    missing, left = every, dict.fromkeys(range(len(usable)))
    chosen: list[Annotated] = []
    while left and len(chosen) < shots:
        best = max(left, key=lambda place: len(kinds[place] & missing))
        chosen.append(usable[best])
        del left[best]
        missing = (missing - kinds[best]) or every
    return chosen, passed_over


def _instruction(text: Annotated, types: Sequence[str], wording: Wording) -> str:
    names = wording.and_.join(filter(None, ["、".join(types[:-1]), types[-1]]))
    return text.instruction or wording.instruction.format(types=names)


def _question(text: Annotated, types: Sequence[str], wording: Wording) -> str:
    question = "{instruction}\n{text}" if text.instruction else wording.question
    return question.format(instruction=_instruction(text, types, wording), text=text.text)
