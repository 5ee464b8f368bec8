"""Files of comparisons: what a user says of them, and how their records become the texts that preparation stores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from engine.config import check_range
from engine.data.conversation_files import check_texts, read_usable
from engine.data.encodings import Encoding
from engine.data.preferences import KEYS, Comparison, dump, is_number, load, recognise_comparison
from engine.data.records import Document, Record, RecordError, SourceFile
from engine.data.sources import only, refusal, unix_newlines
from model.chat import ConversationError, Message
from model.errors import InputError

# A comparison is never divided: what exceeds the context is left out turn by turn, or altogether.
_NO_LIMIT = 1 << 62
# Columns of a table of candidates without a header, of which the first row tells where the label stands.
_HEADERS = (("label", "question", "answer"), ("question", "answer", "label"))


@dataclass(frozen=True)
class PreferenceSchema:
    """A record's text is what it was recognised as, in JSON.

    keys: as `parse_comparison`.
    system: the first message of prompts that have none of their own.
    has_unix_newlines: whether \\r\\n and \\r become \\n.
    """

    keys: Mapping[str, Sequence[str]]
    system: str | None
    has_unix_newlines: bool
    longest: int = _NO_LIMIT
    advice: ClassVar[str] = (
        "Say what its fields mean with --data.keys user=FIELD chosen=FIELD rejected=FIELD (docs/preferences.md), or "
        "leave the file out."
    )

    def recognise(self, value: Any) -> Comparison:
        """The answers of a parsed record, fit to be tokenised; a single one where it has a grade.

        Raises:
            RecordError: they are not.
        """
        try:
            found = recognise_comparison(value, self.keys)
        except ConversationError as error:
            raise RecordError(str(error)) from None
        if self.has_unix_newlines:
            prompt = [Message(message.role, unix_newlines(message.content)) for message in found.prompt]
            responses = [response._replace(text=unix_newlines(response.text)) for response in found.responses]
            found = replace(found, prompt=tuple(prompt), responses=tuple(responses))
        for text in (*(message.content for message in found.prompt), *(text for text, _ in found.responses)):
            if reason := refusal(text):
                raise RecordError(reason)
        if self.system is not None and found.prompt[0].role != "system":
            found = replace(found, prompt=(Message("system", self.system), *found.prompt))
        return found

    def text(self, value: Any) -> str:
        return dump(self.recognise(value))

    def columns(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def header(self, first_row: Sequence[str]) -> Sequence[str]:
        """Names of columns are no numbers: three fields with one at an end are a label, a question and an answer."""
        if len(first_row) == 3 and not self.keys:
            for names in _HEADERS:
                if is_number(first_row[names.index("label")]):
                    return names
        return first_row


@dataclass
class PreferenceOptions:
    """How raw files become comparisons.

    Counts, beside those of texts: answers; answers beyond `max_responses`; comparisons of which grades are more than an
    order; prompts that were shortened to the context, and the turns that this cost. "documents" are records: whole
    comparisons, or single graded answers.
    """

    counts: ClassVar[tuple[str, ...]] = (
        "documents",
        "characters",
        "rejected",
        "responses",
        "beyond_most",
        "with_margins",
        "shortened",
        "dropped_turns",
    )

    keys: dict[str, str] = field(default_factory=dict)
    """what fields mean, where the schema is not known by itself: user=ask chosen=good rejected=bad; + joins fields"""
    system: str | None = None
    """system prompt of prompts that have none; by default they have none"""
    encoding: Encoding = "auto"
    """encoding of all files; auto detects UTF-8, UTF-16 (with mark), GBK and GB18030 file by file"""
    newlines: Literal["keep", "unix"] = "keep"
    """unix: turn \\r\\n and \\r into \\n; keep: leave text exactly as it is"""
    on_error: Literal["skip", "fail"] = "skip"
    """a record that is no comparison is written to rejects.jsonl and skipped, or ends the job"""
    max_responses: int = 9
    """answers to one prompt; of more, the best, the worst and others evenly between them by grade"""

    def __post_init__(self) -> None:
        self.keys = dict(self.keys)
        check_texts(self.keys, KEYS, self.system)
        has = self.keys.keys()
        if has and not ({"chosen", "rejected"} <= has or "responses" in has or "assistant" in has):
            raise InputError(
                "--data.keys needs chosen=FIELD and rejected=FIELD, or responses=FIELD, or assistant=FIELD and "
                "score=FIELD. Add what is missing."
            )

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("data", self, 2, "max_responses")

    @property
    def schema(self) -> PreferenceSchema:
        keys = {key: names.split("+") for key, names in self.keys.items()}
        return PreferenceSchema(keys, self.system, self.newlines == "unix")

    def bare(self) -> PreferenceOptions:
        return only(PreferenceOptions, self)

    def document_of(self, file: SourceFile, sample: bytes) -> Document:
        raise InputError(
            f"{file.path}: a text holds no answers to be compared. Give comparisons (docs/preferences.md), or train on "
            "texts with tools/pretrain.py."
        )

    def is_short(self, record: Record) -> bool:
        return False


def read_comparisons(
    paths: Sequence[str | os.PathLike[str]], options: PreferenceOptions | None = None
) -> Iterator[Comparison]:
    """The comparisons of raw files, for whoever only wants to read; candidates of a table come one by one.

    Records that are none are left out; `prepare` and `check` are what counts them.

    Raises:
        InputError: as `list_files` and `probe`; with on_error "fail" also for a record that is no comparison.
    """
    return map(load, read_usable(paths, options or PreferenceOptions()))
