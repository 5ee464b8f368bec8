"""Files of multiple-choice questions: C-Eval, CMMLU, MedQA of mainland China, CMExam, CMB-Exam.

Text stays as it stands in the file, spaces at its ends included: what becomes of them is a protocol's affair. A record
that is no question is left out, and the reason kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from engine.data.records import RecordError, kind_of, names_in
from evals.choice_subjects import CEVAL, CMMLU
from evals.records import listed, read_values
from evals.suite import nearest
from model.errors import InputError

LETTERS = "ABCDEFGHIJKL"
GENERAL = "医学"
"""What a question is about if its file does not say."""
_CEVAL, _CMMLU = "{split}/{subject}_{split}.csv", "{split}/{subject}.csv"
_ADVICE = "Give a file of the task's own format (docs/evaluation-choice.md)."

Form = Literal["one", "several", "open"]
Fields = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question with its options.

    id: unique in a task.
    text, options: as in the file; options of A, B, C, ... in this order.
    answer: the letters of all right options, in order.
    subject: what the question is counted with; "" for nothing.
    topic: what prompts say it is about, in Chinese.
    form: how many options are right, as far as may be said without the answer: "open" where the file does not say.
    """

    id: str
    text: str
    options: tuple[str, ...]
    answer: str
    subject: str = ""
    topic: str = GENERAL
    form: Form = "one"

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.options)]


@dataclass
class Bank:
    """Questions of some files.

    exemplars: to be shown with their answers, by the subject of the question that they are shown with.
    refused: of each record that is no question: where, and why.
    paths: of all files read.
    """

    questions: list[Question] = field(default_factory=list)
    exemplars: dict[str, list[Question]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)

    def read(self, path: Path, make: Callable[[int, Fields], T], advice: str = _ADVICE) -> list[T]:
        """What the records of a file hold, mostly questions.

        Args:
            make: of the number of a record, from 0, and its fields; raises RecordError.
            advice: to whoever gives a file of which nothing can be made.
        Raises:
            InputError: it is such a file, or cannot be read.
        """
        made, refused = [], []
        for number, record in enumerate(read_values(listed(path))):
            try:
                if record.reason:
                    raise RecordError(record.reason)
                made.append(make(number, record.value))
            except RecordError as error:
                refused.append(f"{path}:{record.line}: {error}")
        if not made:
            raise InputError(f"{refused[0] if refused else f'{path}: there is no record in it'}. {advice}")
        self.refused += refused
        self.paths.append(path)
        return made


def read_ceval(folder: Path, subjects: Sequence[str], split: str, with_exemplars: bool) -> Bank:
    """`{split}/{subject}_{split}.csv`; exemplars are those of dev.

    Args:
        subjects: none for all that are there.
    Raises:
        InputError: a split, a subject or its answers are not there.
    """
    return _read_subjects(folder, subjects, split, with_exemplars, _CEVAL, CEVAL)


def read_cmmlu(folder: Path, subjects: Sequence[str], split: str, with_exemplars: bool) -> Bank:
    """`{split}/{subject}.csv`; otherwise as `read_ceval`."""
    return _read_subjects(folder, subjects, split, with_exemplars, _CMMLU, CMMLU)


def _read_subjects(
    folder: Path, subjects: Sequence[str], split: str, with_exemplars: bool, form: str, names: Mapping[str, str]
) -> Bank:
    if not (folder / split).is_dir() and (folder / "data" / split).is_dir():
        folder = folder / "data"
    before, behind = form.format(split=split, subject="*").split("*")
    found = sorted(
        str(path.relative_to(folder))[len(before) : -len(behind)] for path in folder.glob(f"{before}*{behind}")
    )
    if not found:
        raise InputError(f"{folder}: no {before}*{behind} is in it. Give the folder that holds dev/ and {split}/.")
    for subject in subjects:
        if subject not in found:
            raise InputError(f"{folder}/{before}{subject}{behind}: there is no such file. {nearest(subject, found)}")
    withheld = "The answers of this split were withheld when it was published. Use split=val."
    bank = Bank()
    for subject in subjects or found:

        def to_question(number: int, row: Fields, subject: str = subject) -> Question:
            return _of_columns(f"{subject}/{number}", row, subject, names.get(subject, subject))

        path = folder / form.format(split=split, subject=subject)
        bank.questions += bank.read(path, to_question, withheld if form == _CEVAL and split == "test" else _ADVICE)
        if with_exemplars:
            path = folder / form.format(split="dev", subject=subject)
            if not path.is_file():
                raise InputError(f"{path}: exemplars are taken from it, and it is not there. Fetch it, or use shots=0.")
            bank.exemplars[subject] = bank.read(path, to_question)
    return bank


def _of_columns(id: str, row: Fields, subject: str, topic: str) -> Question:
    """A row of C-Eval or CMMLU, whose columns differ in the size of their first letters only."""
    named = {str(name).lower(): value for name, value in row.items()}
    if not named.get("answer"):
        raise RecordError("it has no answer")
    options = tuple(_text(named, letter) for letter in "abcd")
    return _checked(Question(id, _text(named, "question"), options, named["answer"], subject, topic))


def read_medqa(path: Path) -> Bank:
    """MedQA: JSON lines with question, answer_idx and options, an object or a list of {key, value}.

    Questions are counted by meta_info. It is also what they are about, unless it is a chapter of a book (第一部分 ...).
    """
    bank = Bank()
    bank.questions = bank.read(path, _of_medqa)
    return bank


def _of_medqa(number: int, record: Fields) -> Question:
    given = record.get("options")
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {str(one.get("key")): one.get("value") for one in given}
    options = _lettered(given)
    answer = record.get("answer_idx")
    if not isinstance(answer, str) or answer not in LETTERS[: len(options)]:
        raise RecordError(f'"answer_idx" is {answer!r}, none of its options')
    if isinstance(record.get("answer"), str) and record["answer"] != options[LETTERS.index(answer)]:
        raise RecordError('"answer" is not the option that "answer_idx" names')
    subject = str(record.get("meta_info") or "")
    topic = GENERAL if not subject or subject.startswith("第") else subject
    return _checked(Question(str(number), _text(record, "question"), options, answer, subject, topic))


def read_cmexam(path: Path) -> Bank:
    """CMExam: a table with Question, Options (a line each, "A text") and Answer, of one letter or more."""
    bank = Bank()
    bank.questions = bank.read(path, _of_cmexam)
    return bank


_OPTION_LINE = re.compile(r"([A-L])[\s.、．:：]+(.*)")


def _of_cmexam(number: int, row: Fields) -> Question:
    options: dict[str, str] = {}
    for line in _text(row, "Options").split("\n"):
        opened = _OPTION_LINE.fullmatch(line.strip())
        if opened and opened[1] == LETTERS[len(options)]:
            options[opened[1]] = opened[2]
        elif options and line.strip():  # goes on with the last one
            options[LETTERS[len(options) - 1]] += "\n" + line.strip()
    subject = row.get("Medical Discipline") or ""
    topic = subject or GENERAL
    return _checked(
        Question(str(number), _text(row, "Question"), _lettered(options), _text(row, "Answer"), subject, topic, "open")
    )


_CMB_FORMS: dict[Any, Form] = {"单项选择题": "one", "多项选择题": "several"}


def read_cmb(path: Path, answers: Path | None = None) -> Bank:
    """CMB-Exam: a list of questions with question_type and option {A, ...}, counted by exam_type.

    Args:
        answers: file with id and answer of each, where the questions have none.
    """
    bank = Bank()
    key = dict(bank.read(answers, lambda number, record: (record.get("id"), record.get("answer")))) if answers else {}
    advice = "Give another file of answers." if answers else "Name the file of answers with answers=FILE."

    def to_question(number: int, record: Fields) -> Question:
        answer = record.get("answer") or key.get(record.get("id"))
        if not isinstance(answer, str):
            raise RecordError("it has no answer")
        kind = record.get("question_type")
        if kind not in _CMB_FORMS:
            raise RecordError(f'"question_type" is {kind!r}, neither of {" and ".join(_CMB_FORMS)}')
        topic = next((str(record[name]) for name in ("exam_subject", "exam_class") if record.get(name)), GENERAL)
        options, subject = _lettered(record.get("option")), str(record.get("exam_type") or "")
        return _checked(
            Question(str(number), _text(record, "question"), options, answer, subject, topic, _CMB_FORMS[kind])
        )

    bank.questions = bank.read(path, to_question, advice)
    return bank


def _lettered(options: Any) -> tuple[str, ...]:
    """The options of {A: text, B: text, ...}, without empty ones at the end."""
    if not isinstance(options, dict):
        raise RecordError(f"its options are {kind_of(options)}, not an object of letters")
    names = sorted(options)
    texts = [options[name] for name in names]
    while texts and (texts[-1] is None or not str(texts[-1]).strip()):
        texts.pop()
    if "".join(names[: len(texts)]) != LETTERS[: len(texts)] or len(texts) < 2:
        raise RecordError(f"its options are {names_in(names)}, not A, B and so on")
    return tuple("" if text is None else str(text) for text in texts)


def _text(record: Fields, name: str) -> str:
    if name not in record:
        raise RecordError(f'"{name}" is missing; this record has {names_in(record)}')
    value = record[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RecordError(f'"{name}" is {kind_of(value)}, not a text')
    return value


def _checked(question: Question) -> Question:
    """The question with its answer's letters in order."""
    letters = "".join(sorted(set(re.sub(r"[\s,，、;；]", "", question.answer))))
    if not letters or not set(letters) <= set(question.letters):
        raise RecordError(f"its answer is {question.answer!r}, its options are {question.letters}")
    if question.form == "one" and len(letters) > 1:
        raise RecordError(f"its answer is {question.answer!r}, but one option should be right")
    if not question.text.strip():
        raise RecordError("its question is empty")
    if empty := [letter for letter, option in zip(LETTERS, question.options, strict=False) if not option.strip()]:
        raise RecordError(f"its option {empty[0]} is empty")
    return dataclasses.replace(question, answer=letters)
