"""What is in files of questions, before PPO, rejection sampling or a chat answers them."""

from __future__ import annotations

import json
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

import numpy as np

from engine.data.check_conversations import Counting
from engine.data.check_files import FilesReport, leave_out
from engine.data.conversation_files import ConversationOptions, read_conversations
from engine.data.conversations import question_hash
from engine.data.encodings import detect_encoding
from engine.data.prepare import Progress
from engine.data.report import by_size, histogram
from engine.data.shards import is_prepared
from engine.data.sources import list_files
from engine.prompts import PromptRecord, read_prompts
from model.chat import ConversationError, Message, fit_prompt
from model.errors import InputError

_FIRST_RECORDS = 100
_MOST_TURNS = 8  # questions a prompt; more are counted together
_SAMPLE_CHARACTERS = 400
_UNLIMITED = 1 << 40


@dataclass
class PromptReport(FilesReport):
    """Facts about prompts: conversations up to the question that is to be answered.

    questions: of the prompts, by how many of the user's turns each has; the last is the one to be answered.
    duplicates: repeat an earlier one. repeated: begin with an earlier one's question and go on in another way.
    shortened, dropped_turns: what the context costs.
    lengths: of each prompt, in tokens or else in characters.
    overlap: held-out prompts that begin with a question that is also here.
    sample: one prompt, as the model reads it where it is tokenised.
    """

    questions: Counter[int] = field(default_factory=Counter)
    duplicates: int = 0
    repeated: int = 0
    shortened: int = 0
    dropped_turns: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sample: str = ""


def are_prompts(path: str) -> bool:
    """Whether a file's first records are questions, none of which is answered. Plain texts are texts."""
    if is_prepared(path) or list_files([path]).files[0].format == "text":
        return False
    try:
        if not any(record.messages for record in islice(read_prompts(path), _FIRST_RECORDS)):
            return False
    except InputError:
        return False
    try:
        talks = [*islice(read_conversations([path]), _FIRST_RECORDS)]
    except InputError:
        return True
    return not any(message.role == "assistant" for messages in talks for message in messages)


def check_prompts(
    paths: Sequence[str],
    options: ConversationOptions,
    keys: Mapping[str, str],
    counting: Counting | None = None,
    held_out: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> PromptReport:
    """Read files of questions through, as the jobs that answer them do, and report on them.

    Args:
        options: the system prompt, and whether a record that is no question ends the check.
        keys: what fields mean; those of answers may be missing.
        counting: to count tokens; its context is that of a prompt alone, without room for an answer.
        held_out: raw files; their first questions are looked for in `paths`.
    Raises:
        InputError: a directory prepared for training, or an option that these jobs do not have.
    """
    for path in filter(is_prepared, paths):
        raise InputError(f"{path}: prepared. Check the raw files that it was prepared from.")
    if options.encoding != "auto" or options.newlines != "keep":
        raise InputError(
            "--data.encoding and --data.newlines are not for prompts: what answers them finds the encoding and keeps "
            "the text. Leave them out."
        )
    report = PromptReport(tokens=None if counting is None else 0)
    seen: set[bytes] = set()
    asked, lengths = array("Q"), array("q")
    for place, messages in _read(paths, options, keys, report, progress):
        whole = json.dumps([(message.role, message.content) for message in messages]).encode()
        if (mark := blake2b(whole, digest_size=8).digest()) in seen:
            report.duplicates += 1
            continue
        try:
            length = _length(messages, place, report, counting)
        except ConversationError as error:
            report.fault(place, str(error))
            continue
        seen.add(mark)
        report.questions[sum(message.role == "user" for message in messages)] += 1
        lengths.append(length)
        asked.append(_question(messages))
    report.lengths = np.array(lengths, np.int64)
    report.repeated = len(asked) - len(set(asked))
    if held_out:
        other = PromptReport(unusable=report.unusable)
        known = set(asked)
        questions = [_question(messages) for _, messages in _read(held_out, options, keys, other, None)]
        report.held_out, report.overlap = len(questions), sum(question in known for question in questions)
    return report


def _read(
    paths: Sequence[str],
    options: ConversationOptions,
    keys: Mapping[str, str],
    report: PromptReport,
    progress: Callable[[Progress], None] | None,
) -> Iterator[tuple[str, list[Message]]]:
    """Prompts with their places; what else the files hold goes into the report."""
    listing = list_files(paths)
    report.files, report.ignored_files = len(listing.files), listing.ignored
    began, done = time.monotonic(), 0
    for file in listing.files:
        try:
            is_text = file.format != "parquet"
            report.encodings[detect_encoding(file.path, file.compression) if is_text else "utf-8"] += 1
            report.formats[file.format] += 1
            for record in read_prompts(file.path, keys):
                if record.reason:
                    leave_out(report, options, file.path, record.line, record.reason)
                    continue
                report.read += 1
                yield f"{file.path}:{record.line}", _with_system(record, options.system)
        except InputError as error:
            if options.on_error == "fail":
                raise
            report.unusable.append(str(error))
        done += file.size
        if progress is not None:
            progress(Progress(done, listing.size, 0, report.read, report.tokens or 0, time.monotonic() - began))


def _with_system(record: PromptRecord, system: str | None) -> list[Message]:
    if system is None or record.messages[0].role == "system":
        return record.messages
    return [Message("system", system), *record.messages]


def _length(messages: list[Message], place: str, report: PromptReport, counting: Counting | None) -> int:
    """Tokens of a prompt, or its characters; adds to the report what is counted by the way.

    Raises:
        ConversationError: it cannot be used.
    """
    if counting is None:
        written = "\n".join(f"{message.role}: {message.content}" for message in messages)
        report.sample = report.sample or f"{place}\n{written[:_SAMPLE_CHARACTERS]}"
        return sum(len(message.content) for message in messages)
    template, tokenizer, context = counting
    # `fit_prompt` leaves room for one token more.
    ids, dropped = fit_prompt(template, tokenizer, messages, (context or _UNLIMITED) + 1)
    report.shortened += dropped > 0
    report.dropped_turns += dropped
    report.tokens = (report.tokens or 0) + len(ids)
    report.sample = report.sample or f"{place}\n{tokenizer.decode(ids)[:_SAMPLE_CHARACTERS]}"
    return len(ids)


def _question(messages: Sequence[Message]) -> int:
    first = next(message.content for message in messages if message.role == "user")
    return int.from_bytes(question_hash(first), "little")


def render_prompts(report: PromptReport, context: int | None = None) -> str:
    """The report as a page of text."""
    rows = [
        *report.file_rows(),
        ("prompts", f"{report.questions.total():,}{by_size(report.questions, _MOST_TURNS, 'questions a prompt')}"),
    ]
    if report.tokens is not None:
        rows.append(("tokens", f"{report.tokens:,}"))
    rows += [
        ("duplicates", f"{report.duplicates:,} prompts repeat an earlier one and are answered once"),
        ("same question", f"{report.repeated:,} begin with the question of another and go on otherwise"),
    ]
    if context is not None and report.tokens is not None:
        rows.append(
            ("shortened", f"{report.shortened:,} lose {report.dropped_turns:,} oldest turns at {context:,} tokens")
        )
    rows += report.fault_rows("left out")
    if report.held_out is not None:
        rows.append(("held out", f"{report.held_out:,}, {report.overlap:,} of them with a question to be trained on"))
    lines = [f"{name:<15}{value}" for name, value in rows]
    if len(report.lengths):
        lines += ["", *histogram(report.lengths, "characters" if report.tokens is None else "tokens")]
    if report.sample:
        lines += ["", f"One prompt, {report.sample}"]
    return "\n".join(lines)
