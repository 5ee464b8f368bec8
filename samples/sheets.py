"""A sheet: one kind of document as data, and the few lines that fill it with facts.

`phrases/<kind>.yaml` holds, for each kind, the titles, the frames that set a heading beside its text, the orders in
which sections may come, and the phrases of each section. A phrase is a format string over named facts:

    {symptoms}     the items joined by 、
    {symptoms:；}  joined by another mark
    {symptoms:#}   numbered: 1.…；2.…
    {symptoms[0]}  the first of them

A phrase is possible only when every fact it names is known and not empty, and a section without such a phrase is left
out; so what a document says follows from its facts, without conditions in code. Among the possible ones a document
keeps to one voice, as an author does: the first sections tell how the later ones will be worded.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from samples.draw import Draw

DIRECTORY = Path(__file__).parent / "phrases"
VOICES = 12  # a multiple of 2, 3 and 4, so that every phrase of such lists is spoken equally often
NUMERALS = (*"一二三四五六七八九十", "十一", "十二")


class Items(tuple[str, ...]):
    """Several texts that a phrase joins as it likes."""

    def __format__(self, spec: str) -> str:
        if spec == "#":
            return "；".join(f"{number}.{item}" for number, item in enumerate(self, 1))
        return (spec or "、").join(self)


Facts = dict[str, str | Items]


@dataclass(frozen=True)
class Section:
    headings: Sequence[str]
    bodies: Sequence[str]


@dataclass(frozen=True)
class Sheet:
    titles: Sequence[str]
    frames: Sequence[str]  # over {numeral}, {heading} and {body}
    orders: Sequence[Sequence[str]]  # names of sections
    sections: Mapping[str, Section]

    def fill(self, facts: Facts, draw: Draw) -> str:
        """One document: a title and the sections that these facts can fill, a line each."""
        frame, order, voice = draw.choice(self.frames), draw.choice(self.orders), draw.integer(0, VOICES - 1)
        lines = [say(self.titles, facts, draw.integer(0, VOICES - 1))]
        for name in order:
            section = self.sections[name]
            body = say(section.bodies, facts, voice)
            if body:
                heading = say(section.headings, facts, voice)
                lines.append(frame.format(numeral=NUMERALS[len(lines) - 1], heading=heading, body=body))
        return "\n".join(line for line in lines if line)


def load_sheets(directory: Path = DIRECTORY) -> dict[str, Sheet]:
    """All kinds of documents by name."""
    return {path.stem: _sheet(path) for path in sorted(directory.glob("*.yaml"))}


def say(phrases: Sequence[str], facts: Facts, voice: int) -> str:
    """The voice's choice of the phrases that these facts can fill, filled; empty when there is none."""
    ready = possible(phrases, facts)
    return ready[voice % len(ready)].format_map(facts) if ready else ""


def possible(phrases: Sequence[str], facts: Facts) -> list[str]:
    """Those of the phrases whose every fact is known and not empty."""
    return [phrase for phrase in phrases if all(map(facts.get, fact_names(phrase)))]


@cache
def fact_names(phrase: str) -> frozenset[str]:
    fields = (field for _, field, _, _ in string.Formatter().parse(phrase) if field)
    return frozenset(re.split(r"[.\[]", field)[0] for field in fields)


def _sheet(path: Path) -> Sheet:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections = {name: Section(**section) for name, section in data.pop("sections").items()}
    return Sheet(sections=sections, **data)
