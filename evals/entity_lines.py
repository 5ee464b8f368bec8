"""Answers of one entity a line: 疾病：高血压.

Understood beside that: any colon, -> or a space between type and mention, either of them first; 高血压（疾病）;
numbers, bullets and emphasis; a type as a heading over lines of its mentions; several mentions behind one type, parted
by 、，；.

A line that could be divided is one mention if the type has other lines too, so that the answer gives every mention its
own, and it stands in the text as a whole. A line without a known type is prose, unless the text holds what stands
behind its colon: then it is a mention of a type that was not asked for.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from evals.entity_mentions import TRIMMED, divide, says_none, says_none_of
from evals.entity_text import FoldedText, fold
from evals.entity_types import TypeNames

_MARKER = re.compile(r"\s*(?:[-*•·●▪◦–—]+\s+|[•·●▪◦]\s*|#+\s*|[(（]?\d{1,3}[.．、)）](?!\d)\s*|[①-⑳]\s*)")
_PREFACE = re.compile(r"(?:抽取|提取)?(?:文本|原文|病历|结果|输出|答案|回答|说明|备注|注)\s*[：:]\s*")
_COLON = re.compile(r"[：:]|[-=]>|→")
_BEHIND = re.compile(r"(.+?)\s*[(（]([^()（）]+)[)）]")
_FENCE = re.compile(r"`{3,}\w*")


class Lines(NamedTuple):
    """entities: (type or what stands in its place, mention) in order; prose: lines that name none."""

    entities: list[tuple[str, str]]
    says_none: bool
    prose: int


def read_lines(answer: str, text: FoldedText, types: TypeNames) -> Lines:
    """Read an answer line by line."""
    marked = [line for line in map(str.strip, answer.splitlines()) if not _FENCE.fullmatch(line)]
    marked = [line for line in marked if fold(line.strip(TRIMMED))]
    bare = [_PREFACE.sub("", _without_marker(line), count=1) for line in marked]
    labelled = [_label(line, types) for line in bare]
    labels = [label for label, _ in labelled]
    entities: list[tuple[str, str]] = []
    nothing, prose, heading = False, 0, ""
    for line, rest, (label, value) in zip(marked, bare, labelled, strict=True):
        said = value if label else rest
        stands_there = fold(said.strip(TRIMMED)) in text
        if label and not value:
            heading = label
        elif says_none(said) or (says_none_of(said, types) and not (stands_there and (label or heading))):
            nothing = True
        elif label:
            heading = ""
            entities += ((label, part) for part in _parts(value, text, is_alone=labels.count(label) == 1))
        elif heading and (rest != line or stands_there):
            entities += ((heading, part) for part in _parts(rest, text, is_alone=False))
        elif strangers := _strangers(rest, text):
            entities += strangers
        else:
            prose += 1
    return Lines(entities, nothing, prose)


def _without_marker(line: str) -> str:
    found = _MARKER.match(line)
    return line[found.end() :] if found else line


def _label(line: str, types: TypeNames) -> tuple[str, str]:
    """The type that a line begins or ends with, by its name, and what it is said of; ("", line) without one."""
    candidates = []
    if colons := list(_COLON.finditer(line)):
        first, last = colons[0], colons[-1]
        candidates = [(line[: first.start()], line[first.end() :]), (line[last.end() :], line[: last.start()])]
    elif name := types.find(line):
        return name, ""
    if found := _BEHIND.fullmatch(line.strip(TRIMMED)):
        candidates.append((found[2], found[1]))
    if len(words := line.split()) > 1:
        candidates += [(words[0], line.split(None, 1)[1]), (words[-1], line.rsplit(None, 1)[0])]
    for label, value in candidates:
        if name := types.find(label):
            return name, value.strip(" \t\u3000*`_")
    return "", line


def _parts(value: str, text: FoldedText, is_alone: bool) -> list[str]:
    """The mentions behind a type. is_alone: whether it is the type's only line."""
    parts, whole = divide(value), value.strip(TRIMMED)
    return [whole] if len(parts) > 1 and not is_alone and fold(whole) in text else parts


def _strangers(line: str, text: FoldedText) -> list[tuple[str, str]]:
    """What the text holds of that which stands behind a colon, of a type that is not known."""
    found = _COLON.search(line)
    label = line[: found.start()].strip(TRIMMED) if found else ""
    if not found or not label:
        return []
    return [(label, part) for part in divide(line[found.end() :]) if fold(part) in text]
