"""What is in raw files of conversations, before anything is trained on them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from engine.data.check_files import FilesReport, leave_out, read_files
from engine.data.conversation_files import ConversationOptions
from engine.data.conversations import conversation_hash, load
from engine.data.corpus import open_corpus
from engine.data.encoders import fit_each
from engine.data.prepare import Progress
from engine.data.report import by_size, counts, histogram, keys
from engine.data.shards import is_prepared, prepared_parts, read_manifest
from engine.data.sources import ReadOptions, list_files, probe
from engine.preview import show_ids
from model.chat import ChatTemplate, ConversationError, Encoded, Message
from model.errors import InputError
from model.tokenizer import Tokenizer

_BATCH = 256
_MOST_TURNS = 8  # answers a conversation; more are counted together
_SAMPLE_TOKENS = 400
_UNLIMITED = 1 << 40
_UNANSWERED = "the last question has no answer and is left out"


class Counting(NamedTuple):
    """With what tokens are counted; context None: without asking what would not fit."""

    template: ChatTemplate
    tokenizer: Tokenizer
    context: int | None = None


@dataclass
class ConversationReport(FilesReport):
    """Facts about conversations. Every count is of conversations where nothing else is said.

    schemas: what records were recognised as.
    answers: of the conversations, by how many each has.
    characters: of all contents. tokens, trained: under the template, before anything is shortened; tokens is None
        without one.
    unanswered: kept without their last question, which has no answer.
    duplicates: repeat an earlier one. repeated: begin with an earlier one's question and go on in another way.
    shortened, dropped_turns, cut: what the context costs.
    lengths: of each conversation, in tokens or else in characters.
    overlap: held-out conversations that begin with a question that is also here.
    samples: conversations as they are trained on.
    """

    schemas: Counter[str] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    characters: int = 0
    trained: int = 0
    unanswered: int = 0
    duplicates: int = 0
    repeated: int = 0
    shortened: int = 0
    dropped_turns: int = 0
    cut: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    samples: list[str] = field(default_factory=list)

    @property
    def conversations(self) -> int:
        return self.answers.total()


def are_conversations(paths: Sequence[str], options: ConversationOptions, texts: ReadOptions) -> bool:
    """Whether the first file's first records are conversations, or its directory was prepared from some.

    Raises:
        InputError: they are no texts either.
    """
    if paths and is_prepared(paths[0]):
        return read_manifest(next(prepared_parts(paths[0]))).get("kind") == "conversations"
    first = list_files(paths).files[0]
    if first.format == "text":
        probe(first, texts)
        return False
    try:
        probe(first, options)
    except InputError as no_conversation:
        try:
            probe(first, texts)
        except InputError as no_text:
            if str(no_text) == str(no_conversation):
                raise
            raise InputError(f"{no_conversation} Of texts, name the fields with --data.fields.") from None
        return False
    return True


def check_conversations(
    paths: Sequence[str],
    options: ConversationOptions,
    counting: Counting | None = None,
    held_out: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> ConversationReport:
    """Read raw conversations through and report on them.

    Args:
        counting: to count tokens, and to see what exceeds a context.
        held_out: raw or prepared; its first questions are looked for in `paths`.
    Raises:
        InputError: as `prepare`, but of a file that cannot be read: the report names it.
    """
    for path in filter(is_prepared, paths):
        raise InputError(f"{path}: prepared. Check the raw files that it was prepared from.")
    report = ConversationReport()
    tally = _Tally(report, counting)
    for found in _read(paths, options, report, progress):
        tally.add(found)
    tally.finish()
    if held_out:
        questions = _questions_of(held_out, options, report)
        report.held_out, report.overlap = len(questions), int(np.isin(questions, tally.hashes[:, 1]).sum())
    return report


class _Found(NamedTuple):
    place: str
    messages: list[Message]


def _read(
    paths: Sequence[str],
    options: ConversationOptions,
    report: ConversationReport,
    progress: Callable[[Progress], None] | None,
) -> Iterator[_Found]:
    """Conversations that end with an answer; what else the files hold goes into the report."""
    for file, record in read_files(paths, options, report, progress):
        place, reason = f"{file}:{record.line}", record.reason
        if record.text is not None:
            messages, schema = load(record.text)
            report.schemas[schema] += 1
            is_answered = messages[-1].role == "assistant"
            messages = messages if is_answered else messages[:-1]
            if any(message.role == "assistant" for message in messages):
                if not is_answered:
                    report.unanswered += 1
                    report.see(_UNANSWERED, place)
                yield _Found(place, messages)
                continue
            reason = "it holds no answer"
        leave_out(report, options, file, record.line, reason)


class _Tally:
    """Counts conversations, many at a time."""

    def __init__(self, report: ConversationReport, counting: Counting | None) -> None:
        self._report = report
        self._counting = counting
        self._waiting: list[_Found] = []
        self._lengths = array("q")
        self._hashes = bytearray()
        self._sampled: set[bool] = set()  # a conversation of one turn, and one of several
        if counting is not None:
            report.tokens = 0

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [conversations, 2], as they are stored."""
        return np.frombuffer(bytes(self._hashes), "<u8").reshape(-1, 2)

    def add(self, found: _Found) -> None:
        self._waiting.append(found)
        if len(self._waiting) == _BATCH:
            self._count()

    def finish(self) -> None:
        self._count()
        self._report.lengths = np.array(self._lengths, np.int64)
        each = np.unique(keys(self.hashes)).view("<u8").reshape(-1, 2)
        self._report.duplicates = len(self.hashes) - len(each)
        self._report.repeated = len(each) - len(np.unique(each[:, 1]))

    def _count(self) -> None:
        waiting, self._waiting = self._waiting, []
        for found, result in zip(waiting, self._fit(waiting), strict=True):
            if isinstance(result, ConversationError):
                self._report.fault(found.place, str(result))
                continue
            answers = sum(message.role == "assistant" for message in found.messages)
            characters = sum(len(message.content) for message in found.messages)
            self._report.answers[answers] += 1
            self._report.characters += characters
            self._hashes += conversation_hash(found.messages)
            self._lengths.append(characters if result is None else len(result.ids))
            if result is not None:
                self._count_tokens(found.place, result, answers)

    def _fit(self, waiting: list[_Found]) -> Sequence[Encoded | ConversationError | None]:
        """Each conversation as a whole, or why it cannot be trained on; what the context costs goes into the report."""
        if self._counting is None:
            return [None] * len(waiting)
        template, tokenizer, context = self._counting
        results = fit_each(template, tokenizer, [found.messages for found in waiting], _UNLIMITED)
        if context is None:
            return results
        long = [index for index, whole in enumerate(results) if isinstance(whole, Encoded) and len(whole.ids) > context]
        fitted = fit_each(template, tokenizer, [waiting[index].messages for index in long], context)
        for index, result in zip(long, fitted, strict=True):
            if isinstance(result, ConversationError):
                results[index] = result
                continue
            self._report.shortened += result.dropped_turns > 0
            self._report.dropped_turns += result.dropped_turns
            self._report.cut += result.is_cut
        return results

    def _count_tokens(self, place: str, encoded: Encoded, answers: int) -> None:
        assert self._counting is not None
        self._report.tokens = (self._report.tokens or 0) + len(encoded.ids)
        self._report.trained += sum(encoded.trained)
        has_turns = answers > 1
        if has_turns not in self._sampled:
            self._sampled.add(has_turns)
            shown = show_ids(encoded.ids, encoded.trained, self._counting.tokenizer, _SAMPLE_TOKENS)
            self._report.samples.append(f"{place}\n{shown}")


def _questions_of(paths: Sequence[str], options: ConversationOptions, report: ConversationReport) -> np.ndarray:
    """Hashes of first questions: uint64 [N]. Unusable files go into the report."""
    if all(map(is_prepared, paths)):
        store = open_corpus(paths, kind="conversations").store
        return store.hashes(0, len(store))[:, 1]
    other = ConversationReport(unusable=report.unusable)
    hashes = b"".join(conversation_hash(found.messages) for found in _read(paths, options, other, None))
    return np.frombuffer(hashes, "<u8").reshape(-1, 2)[:, 1]


def render_conversations(report: ConversationReport, context: int | None = None) -> str:
    """The report as a page of text."""
    answers = sum(number * count for number, count in report.answers.items())
    rows = [
        *report.file_rows(),
        ("recognised", counts(report.schemas)),
        ("conversations", f"{report.conversations:,}"),
        ("answers", f"{answers:,}{by_size(report.answers, _MOST_TURNS, 'answers a conversation')}"),
        ("characters", f"{report.characters:,}"),
    ]
    if report.tokens is not None:
        share = report.trained / max(1, report.tokens)
        rows.append(("tokens", f"{report.tokens:,}, {report.trained:,} of them trained ({share:.1%})"))
    rows += [
        ("duplicates", f"{report.duplicates:,} conversations repeat an earlier one and are trained on once"),
        ("same question", f"{report.repeated:,} begin with the question of another and go on otherwise"),
    ]
    if context is not None and report.tokens is not None:
        rows += [
            ("shortened", f"{report.shortened:,} lose {report.dropped_turns:,} oldest turns at {context:,} tokens"),
            ("cut", f"{report.cut:,} last answers that do not fit by themselves"),
        ]
    rows.append(("unanswered", f"{report.unanswered:,} whose last question has no answer and is left out"))
    rows += [("", f"e.g. {place}") for place in report.places.get(_UNANSWERED, [])]
    rows += report.fault_rows("rejected")
    if report.held_out is not None:
        rows.append(("held out", f"{report.held_out:,}, {report.overlap:,} of them with a question to be trained on"))
    lines = [f"{name:<15}{value}" for name, value in rows]
    if report.conversations:
        lines += ["", *histogram(report.lengths, "characters" if report.tokens is None else "tokens")]
    for sample in report.samples:
        lines += ["", f"Trained tokens are marked in {sample}"]
    return "\n".join(lines)
