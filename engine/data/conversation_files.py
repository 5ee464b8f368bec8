"""Files of conversations: what a user says of them, and how their records become the texts that preparation stores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from engine.data.conversations import FOR_COMPARISONS, KEYS, Recognised, dump, load, recognise
from engine.data.encodings import Encoding
from engine.data.preferences import recognise_comparison
from engine.data.reading import read_records
from engine.data.records import Document, Record, RecordError, SourceFile
from engine.data.sources import FileOptions, list_files, malformed, only, probe, refusal, unix_newlines
from model.chat import ConversationError, Message
from model.errors import InputError

# A conversation is never divided: what exceeds the context is left out turn by turn.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class ConversationSchema:
    """A record's text is what it was recognised as, in JSON.

    keys: as `parse_conversation`.
    system: the first message of conversations that have none of their own.
    has_unix_newlines: whether \\r\\n and \\r become \\n.
    """

    keys: Mapping[str, Sequence[str]]
    system: str | None
    has_unix_newlines: bool
    longest: int = _NO_LIMIT
    advice: ClassVar[str] = (
        "Say what its fields mean with --data.keys user=FIELD assistant=FIELD (docs/data.md), or leave the file out."
    )

    def recognise(self, value: Any) -> Recognised:
        """The messages of a parsed record, fit to be tokenised.

        Raises:
            RecordError: they are not.
        """
        try:
            messages, schema = recognise(value, self.keys)
        except ConversationError as error:
            raise RecordError(str(error)) from None
        if not any(message.role == "assistant" for message in messages) and _is_comparison(value):
            raise RecordError(f"it holds no answer; {FOR_COMPARISONS}")
        if self.has_unix_newlines:
            messages = [Message(message.role, unix_newlines(message.content)) for message in messages]
        for number, message in enumerate(messages, 1):
            if reason := refusal(message.content):
                raise RecordError(f"message {number} ({message.role}): {reason}")
        if self.system is not None and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        return Recognised(messages, schema)

    def text(self, value: Any) -> str:
        return dump(self.recognise(value))

    def columns(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        return first_row


def _is_comparison(value: Any) -> bool:
    try:
        return not recognise_comparison(value).is_candidate
    except ConversationError:
        return False


@dataclass
class ConversationOptions:
    """How raw files become conversations.

    Counts, beside those of texts: answers and trained tokens; conversations whose last question had no answer and was
    left out; conversations that were shortened to the context, the turns that this cost, and answers that were cut.
    """

    counts: ClassVar[tuple[str, ...]] = (
        "documents",
        "characters",
        "rejected",
        "answers",
        "trained",
        "unanswered",
        "shortened",
        "dropped_turns",
        "cut",
    )

    keys: dict[str, str] = field(default_factory=dict)
    """what fields mean, where the schema is not known by itself: user=ask assistant=answer; + joins fields"""
    system: str | None = None
    """system prompt of conversations that have none; by default they have none"""
    encoding: Encoding = "auto"
    """encoding of all files; auto detects UTF-8, UTF-16 (with mark), GBK and GB18030 file by file"""
    newlines: Literal["keep", "unix"] = "keep"
    """unix: turn \\r\\n and \\r into \\n; keep: leave text exactly as it is"""
    on_error: Literal["skip", "fail"] = "skip"
    """a record that is no conversation is written to rejects.jsonl and skipped, or ends the job"""

    def __post_init__(self) -> None:
        self.keys = dict(self.keys)
        check_texts(self.keys, KEYS, self.system)
        if self.keys and "turns" not in self.keys and not {"user", "assistant"} <= self.keys.keys():
            raise InputError("--data.keys needs user=FIELD and assistant=FIELD, or turns=FIELD. Add what is missing.")

    @property
    def schema(self) -> ConversationSchema:
        keys = {key: names.split("+") for key, names in self.keys.items()}
        return ConversationSchema(keys, self.system, self.newlines == "unix")

    def bare(self) -> ConversationOptions:
        return only(ConversationOptions, self)

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        raise InputError(
            f"{file.path}: a text has no turns to be trained on. Give conversations (docs/data.md), or train on texts "
            "with tools/pretrain.py."
        )

    def is_short(self, record: Record) -> bool:
        return False


def check_texts(keys: Mapping[str, str], known: Sequence[str], system: str | None) -> None:
    """See that the names of fields and the system prompt say something.

    Raises:
        InputError: a key that is not known, a field without a name, an empty prompt.
    """
    for key, names in keys.items():
        if key not in known:
            raise InputError(f"--data.keys {key}={names}: {key} is none of {', '.join(known)}. Name one of these.")
        if not all(names.split("+")):
            raise InputError(f"--data.keys {key}={names}: a field's name is missing. Write it as {key}=FIELD.")
    if system is not None and not system.strip():
        raise InputError("--data.system is empty. Leave it out for none.")


def read_conversations(
    paths: Sequence[str | os.PathLike[str]], options: ConversationOptions | None = None
) -> Iterator[list[Message]]:
    """The conversations of raw files, for whoever only wants to read. A last question without an answer stays.

    Records that are none are left out; `prepare` and `check` are what counts them.

    Raises:
        InputError: as `list_files` and `probe`; with on_error "fail" also for a record that is no conversation.
    """
    for text in read_usable(paths, options or ConversationOptions()):
        yield load(text).messages


def read_usable(paths: Sequence[str | os.PathLike[str]], options: FileOptions) -> Iterator[str]:
    """The text of each record that has one. Raises InputError as `read_conversations`."""
    for listed in list_files(paths).files:
        file = probe(listed, options)
        for record in read_records(file, options.schema):
            if record.text is not None:
                yield record.text
            elif options.on_error == "fail":
                raise malformed(file.path, record.line, record.reason)
