"""Open questions with their reference answers, whatever file they come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.records import kind_of, names_in
from engine.data.sources import list_files
from evals.records import read_values
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
    files = list_files([path]).files
    for file in files:
        lines: Counter[int] = Counter()
        for line, value, reason in read_values(replace(file, format="csv") if is_table else file, takes_any=True):
            where = f"{file.path}:{line}"
            if reason:
                raise InputError(f"{where}: {reason}. Mend the record, or fetch the file again.")
            lines[line] += 1  # a line may hold several records, as that of a JSON list does
            id = f"{file.name}:{line}" if len(files) > 1 else str(line)
            yield Entry(id if lines[line] == 1 else f"{id}.{lines[line]}", where, value)


def texts_in(value: Any) -> tuple[str, ...]:
    """The texts in a value, lists in lists taken apart, without spaces at the ends. Blank or repeated ones are none."""
    if isinstance(value, str):
        return (value.strip(),) if value.strip() else ()
    if isinstance(value, list):
        return tuple(dict.fromkeys(text for part in value for text in texts_in(part)))
    return ()
