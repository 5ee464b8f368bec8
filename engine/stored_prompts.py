"""Prompts of a run: read once, encoded, each kept once, on disk as flat arrays.

A million prompts take 8 MB of memory a process; their ids and texts are mapped from files that rank 0 writes.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.data.conversations import question_hash
from engine.data.report import without_numbers
from engine.data.sources import list_files
from engine.files import write_durably
from engine.launch import speak
from engine.prompts import PromptRecord, read_prompts
from model.chat import ChatTemplate, ConversationError, Message, fit_prompt
from model.errors import InputError
from model.tokenizer import Tokenizer

FORMAT = 1
# Reasons for which records were left out that are said, each with the line of the first.
_REASONS = 3
_COMPLETE = "prompts.json"  # written last


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the header of its next answer.

    position: in the stream of all that were dealt out; no two of a stream have one.
    ids: what the model reads.
    messages: the same as it was written; older turns than the ids hold may be among them.
    fields: all fields of the record that it is from.
    """

    position: int
    ids: list[int]
    messages: tuple[Message, ...]
    fields: dict[str, Any]


class _Files(NamedTuple):
    """What is on disk. ends, text_ends: int64 [N + 1]. questions: uint64 [N], hashes of the first questions."""

    ids: np.ndarray
    ends: np.ndarray
    text: np.ndarray
    text_ends: np.ndarray
    questions: np.ndarray
    fingerprint: str

    @classmethod
    def open(cls, directory: Path, fingerprint: str) -> _Files:
        ids = np.memmap(directory / "ids.bin", "<u4", "r")
        text = np.memmap(directory / "text.bin", np.uint8, "r")
        ends, text_ends, questions = (
            np.load(directory / f"{name}.npy", mmap_mode="r") for name in ("ends", "text_ends", "questions")
        )
        return cls(ids, ends, text, text_ends, questions, fingerprint)


class Prompts:
    """Distinct prompts, or some of them. rows: int64 [N], which."""

    def __init__(self, files: _Files, rows: np.ndarray) -> None:
        """Use `open_prompts`."""
        self._files, self.rows = files, rows

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, index: int, position: int | None = None) -> Prompt:
        """The prompt at an index, with that or another position."""
        files, row = self._files, self.rows[index]
        ids = files.ids[files.ends[row] : files.ends[row + 1]]
        messages, fields = json.loads(files.text[files.text_ends[row] : files.text_ends[row + 1]].tobytes())
        turns = tuple(Message(*message) for message in messages)
        return Prompt(index if position is None else position, ids.tolist(), turns, fields)

    def first(self, count: int) -> list[Prompt]:
        """The first so many, as far as there are."""
        return [self.prompt(index) for index in range(min(count, len(self)))]

    @cached_property
    def fingerprint(self) -> str:
        """Over all ids and the choice: what the order depends on."""
        return blake2b(self._files.fingerprint.encode() + self.rows.tobytes(), digest_size=16).hexdigest()

    def split(self, fraction: float) -> tuple[Prompts, Prompts]:
        """Prompts to train on, and about `fraction` of them held out.

        A first question decides by its hash, by the rule of `Corpus.split`: what fine-tuning held out of the same file
        with the same fraction is held out here. Where there are two questions or more, each side gets one at least.
        """
        questions = self._files.questions[self.rows]
        bound = np.uint64(int(fraction * 2.0**64))
        different = np.unique(questions)
        if fraction and len(different) > 1:
            bound = np.clip(bound, different[1], different[-1])
        return self._where(questions >= bound), self._where(questions < bound)

    def without(self, others: Prompts) -> Prompts:
        """Those that begin with none of the others' questions."""
        return self._where(~np.isin(self._files.questions[self.rows], others._files.questions[others.rows]))

    def _where(self, is_chosen: np.ndarray) -> Prompts:
        return Prompts(self._files, self.rows[is_chosen])


def open_prompts(
    paths: Sequence[str],
    keys: Mapping[str, str],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: int,
    max_new_tokens: int,
    directory: Path,
    system: str | None = None,
) -> Prompts:
    """The prompts of any files of questions, conversations or preferences, each once.

    Oldest turns are left out whole until prompt and longest answer fit the context. Rank 0 reads the files into
    `directory`/prepared, where others, and later runs, find them: call it within `Runtime.main_first`.

    Args:
        keys: what fields mean where a schema is not known by itself; see `read_prompts`.
        system: system message of prompts that have none.
    Raises:
        InputError: nothing given, a file that cannot be read, or no prompt that fits.
    """
    if max_new_tokens >= context:
        raise InputError(
            f"An answer of {max_new_tokens} tokens leaves no room for its prompt in a context of {context}. Lower "
            "--rollout.max_new_tokens, or raise --train.context."
        )
    files = [(file.path, file.size, Path(file.path).stat().st_mtime_ns) for file in list_files(paths).files]
    facts = [FORMAT, files, sorted(keys.items()), system, template.fingerprint, tokenizer.fingerprint]
    key = blake2b(json.dumps([*facts, context, max_new_tokens]).encode(), digest_size=16).hexdigest()
    target = directory / "prepared" / f"prompts-{key}"
    if not (target / _COMPLETE).exists():
        speak("Reading prompts.")
        target.mkdir(parents=True, exist_ok=True)
        _write(target, paths, keys, template, tokenizer, context - max_new_tokens, system)
    report = json.loads((target / _COMPLETE).read_text(encoding="utf-8"))
    said = [f"{report['count']:,} prompts, {report['tokens']:,} tokens"]
    said += [f"{report[name]:,} {what}" for name, what in _COUNTS.items() if report[name]]
    speak("; ".join(said) + ".")
    for reason, (number, where) in report["refused"].items():
        speak(f"Left out: {number:,} x {reason} (first {where}).")
    if not report["count"]:
        raise InputError(
            f"{', '.join(paths)}: no prompt of it can be used. Give --data other files, or lower "
            "--rollout.max_new_tokens."
        )
    return Prompts(_Files.open(target, report["fingerprint"]), np.arange(report["count"]))


_COUNTS = {"repeated": "repetitions dropped", "shortened": "without their oldest turns, to fit the context"}


def _write(
    target: Path,
    paths: Sequence[str],
    keys: Mapping[str, str],
    template: ChatTemplate,
    tokenizer: Tokenizer,
    room: int,
    system: str | None,
) -> None:
    """Read files into a directory. room: the longest prompt."""
    seen: set[bytes] = set()
    ends, text_ends, questions = array("q", [0]), array("q", [0]), array("Q")
    counts: Counter[str] = Counter()
    refused: dict[str, tuple[int, str, str]] = {}  # by kind: how often; the first one, and its place
    digest = blake2b(digest_size=16)
    with open(target / "ids.bin", "wb") as ids_file, open(target / "text.bin", "wb") as text_file:
        for where, record in _records(paths, keys):
            messages = record.messages
            if system is not None and messages and messages[0].role != "system":
                messages = [Message("system", system), *messages]
            try:
                if record.reason:
                    raise ConversationError(record.reason)
                ids, dropped = fit_prompt(template, tokenizer, messages, room + 1)
            except ConversationError as error:
                number, reason, first = refused.get(kind := without_numbers(str(error)), (0, str(error), where))
                refused[kind] = number + 1, reason, first
                continue
            content = np.array(ids, "<u4").tobytes()
            if (mark := blake2b(content, digest_size=8).digest()) in seen:
                counts["repeated"] += 1
                continue
            seen.add(mark)
            digest.update(mark)
            turns = [(message.role, message.content) for message in messages]
            text = json.dumps([turns, record.fields], default=str).encode()
            ids_file.write(content)
            text_file.write(text)
            ends.append(ends[-1] + len(ids))
            text_ends.append(text_ends[-1] + len(text))
            question = next(message.content for message in messages if message.role == "user")
            questions.append(int.from_bytes(question_hash(question), "little"))
            counts["shortened"] += dropped > 0
    for name, values in (("ends", ends), ("text_ends", text_ends), ("questions", questions)):
        np.save(target / f"{name}.npy", np.array(values))
    most = sorted(refused.values(), key=lambda each: -each[0])[:_REASONS]
    report = {
        "count": len(questions),
        "tokens": ends[-1],
        **{name: counts[name] for name in _COUNTS},
        "refused": {reason: (number, first) for number, reason, first in most},
        "fingerprint": digest.hexdigest(),
    }
    write_durably(target / _COMPLETE, json.dumps(report, ensure_ascii=False, indent=1))


def _records(paths: Sequence[str], keys: Mapping[str, str]) -> Iterator[tuple[str, PromptRecord]]:
    """All records, each with its file and line."""
    for path in paths:
        for record in read_prompts(path, keys):
            yield f"{path}:{record.line}", record
