"""Files of questions: any record that holds a conversation, its beginning, or answers to compare, gives a prompt."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from engine.data.conversation_files import ConversationOptions, ConversationSchema
from engine.data.conversations import KEYS, recognise
from engine.data.preference_files import PreferenceSchema
from engine.data.preferences import KEYS as PREFERENCE_KEYS
from engine.data.preferences import recognise_comparison
from engine.data.reading import read_records
from engine.data.records import Document, RecordError, SourceFile
from engine.data.sources import list_files, probe, refusal
from model.chat import ConversationError, Message

# Where records of questions and answers hold the answer; a record of a question alone has none of these.
_ANSWERS = ("output", "response", "completion", "answer", "answers", "回答", "答案", "a")
_ANSWER = "…"  # stands for the one that is to be given
_NO_FIELD = "\0"  # a name that no field has


class PromptRecord(NamedTuple):
    """A record of a file.

    line: where it begins, from 1 (the row, for Parquet).
    fields: all of them, as they stand there; of a plain text {"prompt": text}.
    messages: up to the question that is to be answered; empty if the record was refused, and `reason` says why.
    """

    line: int
    fields: dict[str, Any]
    messages: list[Message]
    reason: str = ""


def read_prompts(path: Path | str, keys: Mapping[str, str] | None = None) -> Iterator[PromptRecord]:
    """The records of a file (json, jsonl, csv, tsv, parquet; txt, a question a line), in order.

    A conversation whose last turn is an answer loses that answer; of answers to compare, the prompt stays.

    Args:
        keys: what fields mean where the schema is not known by itself, as --data.keys of tools/sft.py and tools/rm.py;
            those of answers may be left out.
    Raises:
        InputError: the file cannot be read, or nothing in its first records is a question.
    """
    options = _PromptOptions(keys=dict(keys or {}))
    for listed in list_files([path]).files:
        file = probe(listed, options)
        for record in read_records(file, options.schema):
            if record.text is None:
                yield PromptRecord(record.line, {}, [], record.reason)
            elif file.format == "text":
                yield PromptRecord(record.line, {"prompt": record.text}, [Message("user", record.text)])
            else:
                found = json.loads(record.text)
                yield PromptRecord(record.line, found["fields"], [Message(*message) for message in found["messages"]])


@dataclass(frozen=True)
class _PromptSchema(ConversationSchema):
    """A record's text is its fields and its prompt, in JSON."""

    advice: ClassVar[str] = (
        "Say which field asks with --data.keys user=FIELD (docs/chatting.md), or leave the file out."
    )

    def text(self, value: Any) -> str:
        fields = value if isinstance(value, dict) else {"prompt": value} if isinstance(value, str) else {"turns": value}
        messages = [Message("user", value)] if isinstance(value, str) else self._messages(value)
        for message in messages:
            if reason := refusal(message.content):
                raise RecordError(reason)
        turns = [[message.role, message.content] for message in messages]
        return json.dumps({"fields": fields, "messages": turns}, default=str)  # a date, in Parquet

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        return PreferenceSchema(self.keys, None, False).header(first_row)

    def _messages(self, value: Any) -> list[Message]:
        asked = [name for key in ("user", "turns") for name in self.keys.get(key, ())]
        if not asked or (isinstance(value, dict) and not all(name in value for name in asked)):
            with contextlib.suppress(ConversationError):
                return list(recognise_comparison(value, self.keys).prompt)
        if isinstance(value, dict) and "user" in self.keys:
            # The answer's field need not be there: a placeholder is.
            value = {**dict.fromkeys(self.keys["assistant"], _ANSWER), **value}
        try:
            messages = self._recognise(value)
        except RecordError as refused:
            # A record without its answer is recognised by what it is with one.
            if not isinstance(value, dict):
                raise
            answers = {name: _ANSWER for name in _ANSWERS if not value.get(name)}
            try:
                messages = self._recognise({**value, **answers})
            except RecordError:
                raise refused from None
        return messages[:-1] if messages[-1].role == "assistant" else messages

    def _recognise(self, value: Any) -> list[Message]:
        try:
            return recognise(value, {key: names for key, names in self.keys.items() if key in KEYS}).messages
        except ConversationError as refused:
            raise RecordError(str(refused)) from None


@dataclass
class _PromptOptions(ConversationOptions):
    """How files become prompts."""

    def __post_init__(self) -> None:
        of_answers = {key: name for key, name in self.keys.items() if key in PREFERENCE_KEYS and key not in KEYS}
        self.keys = {key: name for key, name in self.keys.items() if key not in of_answers}
        if "user" in self.keys:
            self.keys = {"assistant": _NO_FIELD, **self.keys}
        super().__post_init__()
        self.keys |= of_answers

    @property
    def schema(self) -> ConversationSchema:
        return _PromptSchema({key: names.split("+") for key, names in self.keys.items()}, None, False)

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        return "line"
