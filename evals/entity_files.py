"""Texts with marked entities, from files of several datasets, in one form.

What a file says of an entity is checked against its text. Annotators' mentions may differ from the text in case, width
and spaces (`fold`): then the text's own letters are taken, so that a model is shown and asked the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.records import RecordError, kind_of
from engine.data.sources import refusal
from evals.entity_records import read_objects
from evals.entity_text import fold
from evals.entity_types import CCKS2019, CEHRNER, CMEDQANER, CMEEE, EntityType
from model.errors import InputError


class Entity(NamedTuple):
    """type: its name in prompts; mention: as it stands in the text; start, end: where, the end excluded."""

    type: str
    mention: str
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True)
class Annotated:
    """A text and its entities, as they come in the file.

    number: of the record, from 1.
    instruction: how this text wants to be asked; "" for the task's own wording.
    """

    number: int
    text: str
    entities: tuple[Entity, ...]
    instruction: str = ""


@dataclass(frozen=True)
class Layout:
    """Names of a dataset's fields.

    type, mention: the first that is there counts.
    end: "" where the mention's length says it.
    inclusive: whether `end` is the last character instead of the one behind it. Where the mention is given too, its
        length decides, and either is right.
    types: () where the file brings its own.
    files: where a folder is given, the first of these that it holds is read; exemplars: the same for examples.
    """

    text: str = "text"
    entities: str = "entities"
    type: tuple[str, ...] = ("type",)
    mention: tuple[str, ...] = ("mention",)
    start: str = "start"
    end: str = "end"
    inclusive: bool = False
    types: tuple[EntityType, ...] = ()
    files: tuple[str, ...] = ()
    exemplars: tuple[str, ...] = ()


_BLUE = Layout(
    entities="mention_data",
    type=("type", "label"),
    start="offset",
    end="",
    files=("test.json", "cmedqaner_test.json"),
    exemplars=("train.json", "cmedqaner_train.json"),
)
LAYOUTS = {
    "entities": Layout(),
    "chimst": Layout(),
    "ccks2019": Layout(
        text="originalText",
        type=("label_type",),
        mention=("entity_name",),
        start="start_pos",
        end="end_pos",
        types=CCKS2019,
        files=("subtask1_test_set_with_answer.json", "subtask1_test_set_with_answer.jsonl"),
        exemplars=("subtask1_training_part1.txt", "subtask1_training_part1.jsonl"),
    ),
    "cmeee": Layout(
        mention=("entity",),
        start="start_idx",
        end="end_idx",
        inclusive=True,
        types=CMEEE,
        files=("CMeEE_dev.json", "CMeEE-V2_dev.json"),  # the test file has no answers
        exemplars=("CMeEE_train.json", "CMeEE-V2_train.json"),
    ),
    "cmedqaner": dataclasses.replace(_BLUE, types=CMEDQANER),
    "cehrner": dataclasses.replace(_BLUE, type=("label", "type"), types=CEHRNER, files=("test.json",)),
}


class Reading(NamedTuple):
    """What a file holds.

    types: those of the layout, or all that occur, in that order.
    misplaced: of each entity that was left out because the text reads otherwise where it should be, its text's number.
    respelled: entities whose mention the text writes in another case or width.
    """

    texts: tuple[Annotated, ...]
    types: tuple[str, ...]
    misplaced: tuple[int, ...]
    respelled: int

    @property
    def has_spans(self) -> bool:
        """Whether it is said of every entity where it is."""
        return all(entity.start is not None for text in self.texts for entity in text.entities)


def read_annotated(
    path: Path, layout: Layout, leave_out_misplaced: bool = False, known_types: Sequence[str] = ()
) -> Reading:
    """All texts of a file.

    Args:
        known_types: of a file that brings its own, those that another file has: the same ones are called the same.
    Raises:
        InputError: the file or a record of it cannot be used, or an entity is not where it should be.
    """
    names = {alias: kind.name for kind in layout.types for alias in (kind.name, *kind.aliases)}
    texts, seen = [], {fold(name): name for name in known_types or [kind.name for kind in layout.types]}
    misplaced, respelled = [], 0
    for number, (line, record) in enumerate(read_objects(path), 1):
        where = f"{path}:{line}"
        text = _field(record, layout.text, str, where)
        entities = []
        for marked in _field(record, layout.entities, list, where):
            if not isinstance(marked, dict):
                raise InputError(f"{where}: an entity is {kind_of(marked)}, not an object. Mend the record.")
            kind = _type(marked, layout, names, where)
            kind = seen.setdefault(fold(kind), kind)
            try:
                entity, is_respelled = _place(marked, kind, text, layout)
            except _Misplaced as error:
                if not leave_out_misplaced:
                    remedy = "Mend the file, or leave such entities out with misplaced=skip"
                    raise InputError(f"{where}: {error}. {remedy}.") from None
                misplaced.append(number)
                continue
            except RecordError as error:
                raise InputError(f"{where}: {error}. Mend the record, or check which dataset it is of.") from None
            respelled += is_respelled
            entities.append(entity)
        instruction = record.get("instruction", "")
        if not isinstance(instruction, str):
            raise InputError(f'{where}: "instruction" is {kind_of(instruction)}, not a text. Mend the record.')
        texts.append(Annotated(number, text, tuple(entities), instruction))
    if not seen:
        raise InputError(f"{path}: no entity is marked in it. Give a file with answers.")
    return Reading(tuple(texts), tuple(seen.values()), tuple(misplaced), respelled)


def _field(record: dict[str, Any], name: str, kind: type, where: str) -> Any:
    if name not in record:
        known = ", ".join(f'"{key}"' for key in list(record)[:8]) or "nothing"
        raise InputError(f'{where}: "{name}" is missing; this record has {known}. Check which dataset the file is of.')
    if not isinstance(record[name], kind):
        wanted = "a text" if kind is str else "a list"
        raise InputError(f'{where}: "{name}" is {kind_of(record[name])}, not {wanted}. Mend the record.')
    if kind is str and (reason := refusal(record[name])):
        raise InputError(f"{where}: {reason}. Mend the record.")
    return record[name]


def _type(marked: dict[str, Any], layout: Layout, names: dict[str, str], where: str) -> str:
    found = next((marked[name] for name in layout.type if name in marked), None)
    if not isinstance(found, str) or not found.strip():
        raise InputError(f'{where}: an entity has no "{layout.type[0]}". Mend the record.')
    if names and found not in names:
        known = ", ".join(kind.name for kind in layout.types)
        raise InputError(f"{where}: {found} is no type of this dataset; it has {known}. Check which dataset it is.")
    if any(mark in found for mark in ":：\n"):
        raise InputError(f'{where}: the type "{found}" holds a colon, which parts types from mentions. Rename it.')
    return names.get(found, found.strip())


class _Misplaced(RecordError):
    """An entity is not where its record says."""


def _place(marked: dict[str, Any], kind: str, text: str, layout: Layout) -> tuple[Entity, bool]:
    """An entity as the text writes it, and whether that is not how the file does.

    Raises:
        _Misplaced: the text reads otherwise there.
        RecordError: something is missing, or of another kind.
    """
    mention = next((marked[name] for name in layout.mention if name in marked), None)
    if mention is not None and (not isinstance(mention, str) or not fold(mention)):
        raise RecordError("a mention is empty, or no text")
    start, end = _offset(marked, layout.start), _offset(marked, layout.end)
    if start is None:
        if mention is None:
            raise RecordError("an entity has neither a mention nor a place")
        return Entity(kind, mention), False
    if mention is None:
        if end is None:
            raise RecordError("an entity has no end")
        end += layout.inclusive
    else:
        length = start + len(mention)
        if end is not None and end != length and not (layout.inclusive and end == length - 1):
            raise _Misplaced(f'"{mention}" has {len(mention)} characters, and its place {end - start}')
        end = length
    if not 0 <= start < end <= len(text):
        raise _Misplaced(f"an entity lies from {start} to {end}, the text has {len(text)} characters")
    there = text[start:end]
    if mention is not None and fold(there) != fold(mention):
        raise _Misplaced(f'at {start} the text reads "{there}", not "{mention}"')
    if not fold(there):
        raise RecordError(f"from {start} to {end} there are only spaces")
    return Entity(kind, there, start, end), mention is not None and there != mention


def _offset(marked: dict[str, Any], name: str) -> int | None:
    value = marked.get(name)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    if value is not None and type(value) is not int:
        raise RecordError(f'"{name}" is {value!r}, not a whole number')
    return value
