"""What entities an answer names: read as JSON if there is JSON in it, else line by line, whichever was asked for."""

from __future__ import annotations

from typing import NamedTuple

from evals.entity_json import read_json
from evals.entity_lines import Lines, read_lines
from evals.entity_text import FoldedText, fold
from evals.entity_types import TypeNames


class Parsed(NamedTuple):
    """An answer, read.

    entities: (type, mention) in order, each once up to `fold`; the type is one of those asked for, or what the answer
        calls it where that is unknown.
    says_none: it says that there is nothing to name, of some type or at all.
    unknown_types: entities of a type that was not asked for.
    invented: entities whose mention is not in the text.
    repeated: how often an entity was named again.
    prose: lines that name none.
    """

    entities: tuple[tuple[str, str], ...]
    says_none: bool
    unknown_types: int
    invented: int
    repeated: int
    prose: int

    @property
    def is_unreadable(self) -> bool:
        """Whether nothing could be read from it, although it does not say that there is nothing."""
        return not self.entities and not self.says_none


def parse(answer: str, text: FoldedText, types: TypeNames) -> Parsed:
    """Read an answer.

    Args:
        text: what was asked about.
        types: those asked for.
    """
    found = read_json(answer, types)
    lines = Lines(found, not found, 0) if found is not None else read_lines(answer, text, types)
    entities: dict[tuple[str, str], tuple[str, str]] = {}
    unknown_types = invented = named = 0
    for label, mention in lines.entities:
        kind = types.find(label)
        if not (folded := fold(mention)):
            continue
        named += 1
        key = kind or label.strip(), folded
        if key not in entities:
            entities[key] = key[0], mention
            unknown_types += kind is None
            invented += folded not in text
    repeated = named - len(entities)
    return Parsed(tuple(entities.values()), lines.says_none, unknown_types, invented, repeated, lines.prose)
