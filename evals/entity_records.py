"""JSON objects of the files that hold marked texts, and prompts with their answers written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evals.records import listed, read_values
from model.errors import InputError


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file in JSON, a list of them or one a line, whatever the file's name ends in, with their lines.

    Raises:
        InputError: it cannot be read, is of no known encoding, a record is no object, or there is none.
    """
    line = 0
    for line, value, reason in read_values(dataclasses.replace(listed(path), format="json_lines")):
        if reason:
            raise InputError(f"{path}:{line}: {reason}. Mend the record, or remove it.")
        yield line, value
    if not line:
        raise InputError(f"{path}: there is no record in it. Give another file.")


class Written(NamedTuple):
    """A prompt and the answer that is right. number: of the record, from 1."""

    number: int
    prompt: str
    output: str


def read_written(path: Path) -> tuple[Written, ...]:
    """Records {"prompt": [text], "output": [text]}, or texts in place of the lists. Raises InputError."""
    return tuple(
        Written(number, *(_only_text(record, name, f"{path}:{line}") for name in ("prompt", "output")))
        for number, (line, record) in enumerate(read_objects(path), 1)
    )


def holds_written(path: Path) -> bool:
    """Whether the first record of a file is a prompt with its answer. Raises InputError."""
    return {"prompt", "output"} <= next(read_objects(path))[1].keys()


def find_file(path: Path, names: tuple[str, ...], what: str) -> Path:
    """The file that is meant: `path` itself, or in a folder the first of `names`. Raises InputError."""
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    known = f"none of {', '.join(names)} is in it" if names else "it is a folder"
    raise InputError(f"{path}: {known}. Name the file {what}.")


def _only_text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str):
        raise InputError(f'{where}: "{name}" is not one text. Give a text, or a list that holds one.')
    return value
