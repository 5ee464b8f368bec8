"""Comparisons where a full answer is known: of notes to extract from, and of the last answer of longer conversations.

Beside the full answer stand the curt one, where the script knows it, and wrong ones: a list that repeats itself or
takes lines of another note, the answer that another conversation of the kind ends with. Likeness to the full answer
grades them (`samples.likeness`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from samples.dialogues import Dialogue
from samples.draw import Draw
from samples.likeness import EXTRACTION
from samples.scripts import Script
from samples.topics import Topic

TRIES = 8  # to have a script be curt in the last answer


def has_full_answer(dialogue: Dialogue) -> bool:
    """Whether its last answer is one to compare with: where several turns lead there, or a note is extracted from."""
    return dialogue.kind == EXTRACTION or sum(message.role == "user" for message in dialogue.messages) > 1


def replies(dialogue: Dialogue, topic: Topic, script: Script, others: Sequence[Dialogue]) -> list[str]:
    """Different last answers to a conversation, the full one first.

    Args:
        others: conversations of the kind.
    """
    draw = Draw(f"replies/{dialogue.id}")
    full = dialogue.messages[-1].content
    other = draw.choice(others).messages[-1].content
    texts = [full, *_curt(dialogue, topic, script)]
    if dialogue.kind == EXTRACTION:
        lines = full.split("\n")
        texts += ["\n".join(_stuttered(lines, draw)), "\n".join(_mixed(lines, other.split("\n"), draw))]
    else:
        texts.append(other)
    return list(dict.fromkeys(texts))


def _curt(dialogue: Dialogue, topic: Topic, script: Script) -> Iterator[str]:
    for number in range(TRIES):
        hurry = Draw(f"curt/{dialogue.id}/{number}")
        said = script.fill(topic.facts, Draw(dialogue.id), hurry)[-1].content
        if said != dialogue.messages[-1].content:
            yield said
            return


def _stuttered(lines: Sequence[str], draw: Draw) -> list[str]:
    """The lines, one of them several times, in place of as many of those that follow it."""
    place, times = draw.integer(0, len(lines) - 1), draw.integer(2, 4)
    return [*lines[:place], *[lines[place]] * times, *lines[place + times :]]


def _mixed(lines: Sequence[str], others: Sequence[str], draw: Draw) -> list[str]:
    """The lines, one or two of them replaced by another note's."""
    mixed = list(lines)
    for place in draw.shuffled(range(len(lines)))[: draw.integer(1, 2)]:
        mixed[place] = draw.choice(others)
    return mixed
