"""Answers to a file of questions: one line a question and sample, in the order of the file, whatever interrupts.

The lines already there say how far the work is: the i-th belongs to the i-th prompt and sample, so a run that was
killed goes on behind the last whole line. Prompts are answered in groups of 16 times `max_rows`, each by continuous
batching, and a group that was not finished is computed again from its first prompt. So a row shares every product of
matrices with the rows that it would have shared it with had nothing happened, and the file is the same to the byte;
what is computed twice is a group at most. The price is that the batch runs empty at the end of each, for as long as
the longest answer exceeds a mean one, beside the time of 16 mean ones.

Beside the file lies what made it (`FILE.meta.json`): another model, input or option is refused, as it would mix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.chatting import ChatModel, Prompt, SamplingConfig
from engine.files import claim, digest_files, explain, write_durably
from engine.launch import speak
from engine.live_line import LiveLine, duration
from engine.prompts import PromptRecord, read_prompts
from model.chat import ConversationError, Message
from model.errors import InputError
from model.generate import Request
from model.sampling import row_seed

GROUP = 16
"""Prompts of a group, as a multiple of the rows that are decoded at once."""
_REFUSALS_SAID = 20


@dataclass(frozen=True)
class BatchOptions:
    """What is answered, and how. All of it decides the answers.

    samples: answers to each prompt.
    system: system message of prompts that have none.
    """

    input: str
    sampling: SamplingConfig
    samples: int = 1
    seed: int = 0
    system: str | None = None
    keys: dict[str, str] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """See to what can be seen before a model is loaded. Raises InputError."""
        self.sampling.options(())
        if self.samples < 1:
            raise InputError(f"--samples is {self.samples}. Use at least 1.")
        if Path(self.input).is_dir():
            raise InputError(f"--input {self.input}: this is a directory, and a file is wanted. Name one of its files.")
        if not Path(self.input).is_file():
            raise InputError(f"--input {self.input}: there is no such file. Check the path.")


class _Question(NamedTuple):
    """A prompt in ids, and where it is from."""

    record: PromptRecord
    prompt: Prompt
    seed: int


def answer_file(model: ChatModel, options: BatchOptions, output: Path, max_rows: int) -> int:
    """Answer every record of `options.input`.

    Each line is a record's own fields and line, sample, answer, tokens, end_reason ("stop" or "length"), logprob (sum
    over the answer's tokens, under softmax(logits / temperature)), seed and dropped_turns. Where a record has a field
    of such a name, its own stands in "given".

    Returns:
        lines that were written, by this call.
    Raises:
        InputError: the input cannot be read or holds no question; `output` was begun with other options, is not what
            this wrote, or cannot be written.
    """
    options.check()
    refusals = _Refusals(options.input)
    try:
        with _claimed(output) as file:
            _check_same_run(output, _identity(model, options, max_rows), file)
            done, last = _whole_lines(file, output)
            written = _answer(model, options, file, done, last, max_rows, refusals)
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"--output {output}: {explain(error)}") from None
    refusals.report()
    if not done and not written:
        raise InputError(f"{options.input}: there is no question in it. Give --input another file.")
    return written


def _answer(
    model: ChatModel,
    options: BatchOptions,
    file: BinaryIO,
    done: int,
    last: tuple[int, int],
    max_rows: int,
    refusals: _Refusals,
) -> int:
    """Write the lines behind the first `done`, the last of which is of this line and sample; how many they are."""
    meter, number = _Meter(done), 0
    questions = _questions(model, options, refusals)
    while group := list(itertools.islice(questions, GROUP * max_rows)):
        lines = [(question.record.line, sample) for question in group for sample in range(options.samples)]
        if number < done <= number + len(lines) and lines[done - number - 1] != last:
            raise InputError(
                f"{file.name}:{done}: another answer should stand there. Move the file away, with its meta."
            )
        if done < number + len(lines):
            for line in itertools.islice(_answer_group(model, options, group, meter), max(0, done - number), None):
                file.write(line)
                file.flush()
        number += len(lines)
    if number < done:
        raise InputError(
            f"{file.name}: it holds {done} lines, but {number} are due. Move the file away, with its meta."
        )
    meter.end()
    return number - done


def _answer_group(
    model: ChatModel, options: BatchOptions, group: Sequence[_Question], meter: _Meter
) -> Iterator[bytes]:
    """Lines in order, each as soon as it and those before it are there."""
    generator, sampling = model.generator, options.sampling.options(model.stop_ids)
    requests = [Request(question.prompt.ids, sampling, options.samples, question.seed) for question in group]
    places = {generator.add(request): place for place, request in enumerate(requests)}
    rows = [[_Row() for _ in range(options.samples)] for _ in group]
    order = (
        (question, sample, row)
        for question, row_of in zip(group, rows, strict=True)
        for sample, row in enumerate(row_of)
    )
    current = next(order, None)
    while not generator.is_idle:
        for event in generator.step():
            row = rows[places[event.request]][event.sample]
            row.pieces.append(event.text)
            row.tokens += 1
            row.logprob += event.logprob
            row.end_reason = event.end_reason
            meter.count(is_end=event.end_reason is not None)
        while current is not None and current[2].end_reason is not None:
            yield _line(*current)
            current = next(order, None)
    assert current is None


@dataclass
class _Row:
    """An answer on its way."""

    pieces: list[str] = dataclasses.field(default_factory=list)
    tokens: int = 0
    logprob: float = 0.0
    end_reason: str | None = None


def _line(question: _Question, sample: int, row: _Row) -> bytes:
    ours = {
        "line": question.record.line,
        "sample": sample,
        "answer": "".join(row.pieces),
        "tokens": row.tokens,
        "end_reason": row.end_reason,
        "logprob": round(row.logprob, 6),
        "seed": question.seed,
        "dropped_turns": question.prompt.dropped_turns,
    }
    given = {name: value for name, value in question.record.fields.items() if name in ours or name == "given"}
    rest = {name: value for name, value in question.record.fields.items() if name not in given}
    line = json.dumps({**rest, **({"given": given} if given else {}), **ours}, ensure_ascii=False)
    # Half a surrogate pair in a field is no UTF-8; written as an escape it is JSON again.
    return line.encode(errors="backslashreplace") + b"\n"


def _questions(model: ChatModel, options: BatchOptions, refusals: _Refusals) -> Iterator[_Question]:
    for record in read_prompts(options.input, options.keys):
        messages = record.messages
        if record.reason:
            refusals.add(record.line, record.reason)
            continue
        if options.system and messages[0].role != "system":
            messages = [Message("system", options.system), *messages]
        try:
            prompt = model.prompt(messages, options.sampling.max_new_tokens)
        except ConversationError as error:
            refusals.add(record.line, str(error))
            continue
        yield _Question(record, prompt, row_seed(options.seed, record.line))


class _Refusals:
    """Records that are no questions: said at once, and counted at the end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._count = 0

    def add(self, line: int, reason: str) -> None:
        self._count += 1
        if self._count <= _REFUSALS_SAID:
            speak(f"{self._path}:{line}: left out: {reason}.")

    def report(self) -> None:
        if self._count:
            unsaid = f", {self._count - _REFUSALS_SAID:,} of them unnamed" if self._count > _REFUSALS_SAID else ""
            speak(f"{self._count:,} records of {self._path} were left out{unsaid}.")


class _Meter:
    """How fast it goes."""

    def __init__(self, done: int) -> None:
        self._line, self._began = LiveLine(), time.monotonic()
        self._tokens = self._answers = 0
        if done:
            speak(f"{done:,} answers are there already.")

    def count(self, is_end: bool) -> None:
        self._tokens += 1
        self._answers += is_end
        if is_end:
            self._line.show(self._text())

    def end(self) -> None:
        if self._answers:
            self._line.show(self._text(), is_last=True)

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        return (
            f"{self._answers:,} answers, {self._tokens:,} tokens, {self._tokens / max(seconds, 1e-9):,.0f} tokens/s, "
            f"{duration(seconds)}"
        )


# The file and what made it


@contextlib.contextmanager
def _claimed(output: Path) -> Iterator[BinaryIO]:
    """The file, open for this process alone, as far as the filesystem knows locks."""
    if output.exists() and not output.is_file():
        raise InputError(f"--output {output} is no file that could be gone on with. Choose another.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a+b") as file:
        claim(
            file,
            f"--output {output}: another process is writing it. Wait for it, or choose another.",
            f"{output}: its filesystem offers no locks. Let no two processes write it at the same time.",
        )
        yield file


def _whole_lines(file: BinaryIO, output: Path) -> tuple[int, tuple[int, int]]:
    """How many lines are there, and what line of the input and sample the last is of; what is torn behind it goes."""
    file.seek(0)
    count, end, last = 0, 0, b""
    for line in file:
        if line.endswith(b"\n"):
            count, end, last = count + 1, end + len(line), line
    try:
        found = json.loads(last) if last else {"line": 0, "sample": 0}
        place = found["line"], found["sample"]
    except (ValueError, LookupError, TypeError):
        raise InputError(
            f"{output}:{count}: this is no answer. Move the file away, or choose another --output."
        ) from None
    file.truncate(end)
    return count, place


def _check_same_run(output: Path, identity: dict[str, Any], file: BinaryIO) -> None:
    """Compare with what the file was begun with; write it down where nothing is in it yet."""
    path = output.with_name(f"{output.name}.meta.json")
    if not file.seek(0, os.SEEK_END):
        return write_durably(path, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
    if not path.exists():
        raise InputError(f"{output} exists and {path.name} does not, so nobody knows what made it. Move it away.")
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: not readable as JSON. Move it and {output.name} away.") from None
    for name, value in identity.items():
        if before.get(name) != value:
            is_digest = name in ("input", "model")
            found = f"another {name}" if is_digest else f"{name} {before.get(name)!r}, this command says {value!r}"
            raise InputError(f"{output} was begun with {found}. Use the same, or another --output.")


def _identity(model: ChatModel, options: BatchOptions, max_rows: int) -> dict[str, Any]:
    """What decides the answers."""
    generator = model.generator
    return {
        "seed": options.seed,
        "samples": options.samples,
        "system": options.system,
        "keys": options.keys,
        **dataclasses.asdict(options.sampling),
        "context": generator.context,
        "max_rows": max_rows,
        "device": generator.device.type,
        "dtype": str(generator.dtype).removeprefix("torch."),
        "template": f"{model.template.name} {model.template.fingerprint}",
        "stop_ids": list(model.stop_ids),
        "input": digest_files(Path(options.input)),
        "model": model.fingerprint,
    }
