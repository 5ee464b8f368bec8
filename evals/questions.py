"""Open questions with their reference answers, whatever file they come from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from engine.data.conversation_files import ConversationOptions, ConversationSchema
from engine.data.encodings import detect_encoding
from engine.data.reading import read_records
from engine.data.records import kind_of, names_in
from engine.data.sources import list_files, probe
from model.chat import Message
from model.errors import InputError


@dataclass(frozen=True)
class Question:
    """What is asked, and what was answered.

    id: the line that it stands in, with the file's name where there are several files, and a number where there are
        several in a line; unique in a task.
    messages: up to the turn that is to be given; the last one is the user's.
    references: at least one, none of them blank.
    group: department or specialty, "" for none.
    """

    id: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Questions:
    """What a file holds.

    counts: of records that were left out, by the reason; and of questions that were asked before in the file.
    notes: what a reader of the result must know of that.
    """

    questions: tuple[Question, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """64 bits in hex over the questions and references."""
        return blake2b(repr(self.questions).encode(), digest_size=8).hexdigest()


class Entry(NamedTuple):
    """A record of a file. id: as of a question; where: file and line, for messages; value: as JSON has it."""

    id: str
    where: str
    value: Any

    @property
    def fields(self) -> dict[str, Any]:
        """Raises InputError: the record has none."""
        if not isinstance(self.value, dict):
            raise InputError(
                f"{self.where}: a record is an object with named fields, this one is {kind_of(self.value)}. Mend it, "
                "or name the task that this file is for."
            )
        return self.value

    def take(self, name: str) -> Any:
        """A field. Raises InputError: it is not there."""
        if name not in self.fields:
            raise InputError(
                f'{self.where}: "{name}" is missing; this record has {names_in(self.fields)}. Name the task that this '
                "file is for (docs/evaluation-generation.md)."
            )
        return self.fields[name]


def gather(
    path: Path | str, questions: Sequence[Question], counts: Counter[str], notes: Sequence[str] = ()
) -> Questions:
    """What a reader found, with the questions that were asked before counted.

    Raises:
        InputError: nothing was found, or what no tokenizer can take.
    """
    if not questions:
        left_out = "".join(f"; {number} records {name.replace('_', ' ')}" for name, number in counts.items())
        raise InputError(f"{path}: no question with an answer is in it{left_out}. Give another file.")
    for question in questions:
        try:
            "".join((*(message.content for message in question.messages), *question.references)).encode()
        except UnicodeEncodeError:
            raise InputError(f"{path}: question {question.id} holds half a surrogate pair. Mend its record.") from None
    counts["repeated"] = len(questions) - len({question.messages for question in questions})
    return Questions(tuple(questions), {name: number for name, number in counts.items() if number}, tuple(notes))


def read_entries(path: Path | str, is_table: bool = False) -> Iterator[Entry]:
    """The records of a file, or of all files of a folder: json, jsonl, csv, tsv, parquet, as they stand there.

    Args:
        is_table: whether it is CSV, whatever its name says.
    Raises:
        InputError: a file cannot be read, or a record is broken.
    """
    listed = list_files([path]).files
    for file in listed:
        if is_table:
            file = replace(file, format="csv", encoding=detect_encoding(file.path, file.compression))
        else:
            file = probe(file, _AnyOptions())
        lines: Counter[int] = Counter()
        for record in read_records(file, _AnySchema()):
            where = f"{file.path}:{record.line}"
            if record.text is None:
                raise InputError(f"{where}: {record.reason}. Mend the record, or fetch the file again.")
            lines[record.line] += 1  # a line may hold several records, as that of a JSON list does
            id = f"{file.name}:{record.line}" if len(listed) > 1 else str(record.line)
            id = id if lines[record.line] == 1 else f"{id}.{lines[record.line]}"
            yield Entry(id, where, json.loads(record.text))


def texts_in(value: Any) -> tuple[str, ...]:
    """The texts in a value, lists in lists taken apart, without spaces at the ends. Blank or repeated ones are none."""
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    if isinstance(value, list):
        return tuple(dict.fromkeys(text for part in value for text in texts_in(part)))
    return ()


class _AnySchema(ConversationSchema):
    """A record's text is the record, in JSON."""

    advice: ClassVar[str] = "Mend the record, or fetch the file again."

    def __init__(self) -> None:
        super().__init__({}, None, False)

    def text(self, value: Any) -> str:
        return json.dumps(value, default=str)  # a date, in Parquet


class _AnyOptions(ConversationOptions):
    """Files of records with any fields."""

    @property
    def schema(self) -> ConversationSchema:
        return _AnySchema()
