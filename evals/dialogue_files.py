"""MC, the dialogues of doctors and patients behind HET-MC (Song et al., COLING 2020), in their .dialog files.

id	37283	department	眼科	disease	...        "apartment" in the published test file
P	text	label                               what the patient writes; D: the doctor; SUM1, SUM2.0, ...: summaries
                                             a blank line ends a dialogue
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.data.encodings import Stream, detect_encoding
from evals.questions import Question, Questions, gather
from model.chat import Message, Role
from model.errors import InputError

_SPEAKERS: dict[str, Role] = {"P": "user", "D": "assistant"}


class _Line(NamedTuple):
    number: int
    columns: list[str]


def read_dialogues(path: Path | str) -> Questions:
    """The doctor's last turn of every dialogue, given what was said before it.

    Lines that one speaker writes in a row are one turn of several lines. What the doctor says before the patient's
    first turn is left out, and what the patient says behind the doctor's last one is not needed.

    Raises:
        InputError: not such a file, or no doctor answers in it.
    """
    questions: list[Question] = []
    counts: Counter[str] = Counter()
    for header, lines in _dialogues(path):
        turns = _merged(lines)
        if turns and turns[0].role == "assistant":
            counts["opened_by_doctor"] += 1
            del turns[0]
        if turns and turns[-1].role == "user":
            del turns[-1]
        if not turns:
            counts["without_doctor_answer"] += 1
            continue
        fields = dict(zip(header.columns[::2], header.columns[1::2], strict=False))
        department = fields.get("department") or fields.get("apartment") or ""
        questions.append(Question(str(header.number), tuple(turns[:-1]), (turns[-1].content,), department))
    return gather(path, questions, counts)


def _dialogues(path: Path | str) -> Iterator[tuple[_Line, list[_Line]]]:
    """Header and lines of each dialogue."""
    header: _Line | None = None
    lines: list[_Line] = []
    for line in _lines(str(path)):
        if line.columns[0] == "id":
            if header is not None:
                yield header, lines
            header, lines = line, []
        elif header is None:
            raise InputError(
                f"{path}:{line.number}: a dialogue begins with a line of id, TAB and a number, this one with "
                f"{line.columns[0][:20]!r}. Give a .dialog file of MC, or name the task dialogue for conversations."
            )
        elif line.columns[0] in _SPEAKERS and len(line.columns) >= 2:
            lines.append(line)
        elif not line.columns[0].startswith("SUM"):
            raise InputError(
                f"{path}:{line.number}: a line begins with P, D or SUM and a TAB, this one with "
                f"{line.columns[0][:20]!r}. Mend the line, or fetch the file again."
            )
    if header is not None:
        yield header, lines


def _lines(path: str) -> Iterator[_Line]:
    """Those that are not blank, at tabs taken apart."""
    encoding = detect_encoding(path, "")
    with Stream(path, "", encoding) as stream:
        number = 0
        while content := stream.readline():
            number += 1
            try:
                text = content.decode(stream.codec).rstrip("\r\n")
            except UnicodeDecodeError:
                raise InputError(
                    f"{path}:{number}: not {stream.codec}. Mend the line, or fetch the file again."
                ) from None
            if text.strip():
                yield _Line(number, text.split("\t"))


def _merged(lines: Iterable[_Line]) -> list[Message]:
    """Turns, speakers in turn."""
    turns: list[Message] = []
    for line in lines:
        role, text = _SPEAKERS[line.columns[0]], line.columns[1].strip()
        if not text:
            continue
        if turns and turns[-1].role == role:
            text = f"{turns.pop().content}\n{text}"
        turns.append(Message(role, text))
    return turns
