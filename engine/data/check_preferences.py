"""What is in raw files of comparisons, before anything is trained on them."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np

from engine.data.candidates import join
from engine.data.check_conversations import Counting
from engine.data.check_files import FilesReport, leave_out, read_files
from engine.data.preference_files import PreferenceOptions, read_comparisons
from engine.data.preferences import Comparison, load, spread
from engine.data.prepare import Progress
from engine.data.ranked_encoder import RankedEncoder, comparison_hash, digest, unpack
from engine.data.records import Record
from engine.data.report import by_size, counts, histogram
from engine.data.shards import TRAINED, is_prepared
from engine.data.sources import list_files
from engine.preview import show_ids
from model.errors import InputError

_BATCH = 256
_MOST_ANSWERS = 10  # of a prompt; more are counted together
_SAMPLE_TOKENS = 200
_SAMPLE_CHARACTERS = 200
_FIRST_RECORDS = 1000
_UNLIMITED = 1 << 30


@dataclass
class PreferenceReport(FilesReport):
    """Facts about comparisons.

    schemas: what records were recognised as.
    prompts: how many have how many answers that are compared with each other.
    lengths: of each answer with its prompt, in tokens or else in characters; most: of all answers to one prompt.
    pairs: of answers with different grades; longer: of how many the longer answer is the better, equal lengths counting
        half: what "longer wins" gets right.
    graded: records whose grades are more than an order.
    faults: questions that are left out, too.
    duplicates: comparisons and candidates that repeat an earlier one. repeated: prompts that begin with the question of
        an earlier one. contradicted: pairs that another record has the other way round.
    beyond_most: answers beyond `max_responses`.
    shortened, dropped_turns: records that the context costs turns.
    overlap: held-out records that begin with a question that is also here.
    sample: one comparison.
    """

    schemas: Counter[str] = field(default_factory=Counter)
    prompts: Counter[int] = field(default_factory=Counter)
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    most: int = 0
    pairs: int = 0
    longer: float = 0.0
    graded: int = 0
    duplicates: int = 0
    repeated: int = 0
    contradicted: int = 0
    beyond_most: int = 0
    shortened: int = 0
    dropped_turns: int = 0
    sample: str = ""


def are_preferences(paths: Sequence[str], options: PreferenceOptions) -> bool:
    """Whether the first file's first records compare answers: records of several, or graded ones to one question."""
    if not paths or is_prepared(paths[0]):
        return False
    first = list_files(paths).files[0]
    if first.format == "text":
        return False
    try:
        found = [*islice(read_comparisons([first.path], options), _FIRST_RECORDS)]
    except InputError:
        return False
    candidates = Counter(each.prompt for each in found if each.is_candidate)
    return candidates.total() < len(found) or len(candidates) < len(found)


def check_preferences(
    paths: Sequence[str],
    options: PreferenceOptions,
    counting: Counting | None = None,
    held_out: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> PreferenceReport:
    """Read raw comparisons through and report on them.

    Args:
        counting: to count tokens, and to see what exceeds a context.
        held_out: raw files; their first questions are looked for in `paths`.
    Raises:
        InputError: as `prepare`, but of a file that cannot be read: the report names it.
    """
    for path in filter(is_prepared, paths):
        raise InputError(f"{path}: prepared. Check the raw files that it was prepared from.")
    report = PreferenceReport()
    tally = _Tally(report, options, counting)
    for found in _read(paths, options, report, progress):
        tally.add(found)
    tally.finish()
    if held_out:
        other = _read(held_out, options, PreferenceReport(unusable=report.unusable), None)
        questions = np.array([_question(found.comparison) for found in other], np.uint64)
        report.held_out, report.overlap = len(questions), int(np.isin(questions, tally.questions()).sum())
    return report


class _Found(NamedTuple):
    path: str
    record: Record
    comparison: Comparison

    @property
    def place(self) -> str:
        return f"{self.path}:{self.record.line}"


class _Measured(NamedTuple):
    """Of each answer: its grade, its length, and the length of its prompt with it."""

    grades: np.ndarray
    alone: np.ndarray
    whole: np.ndarray


def _read(
    paths: Sequence[str],
    options: PreferenceOptions,
    report: PreferenceReport,
    progress: Callable[[Progress], None] | None,
) -> Iterator[_Found]:
    """Comparisons and candidates; what else the files hold goes into the report."""
    for file, record in read_files(paths, options, report, progress):
        if record.text is None:
            leave_out(report, options, file, record.line, record.reason)
            continue
        comparison = load(record.text)
        report.schemas[comparison.schema] += 1
        report.graded += comparison.has_margins
        yield _Found(file, record, comparison)


class _Tally:
    """Counts comparisons, many at a time, by hashes and numbers alone; candidates wait for each other."""

    def __init__(self, report: PreferenceReport, options: PreferenceOptions, counting: Counting | None) -> None:
        self._report, self._counting, self._most = report, counting, options.max_responses
        self._encoder: RankedEncoder | None = None
        if counting is not None:
            context = counting.context or _UNLIMITED
            self._encoder = RankedEncoder(counting.template, counting.tokenizer, context, options.max_responses)
        self._waiting: list[_Found] = []
        self._lengths = array("q")
        self._whole = array("Q")  # a hash of each comparison
        self._asked = array("Q")  # and of the question that it begins with
        self._pairs = array("Q")  # of each record of two answers, and of the same the other way round
        self._turned = array("Q")
        # Of each candidate: hashes of prompt, question and answer; grade; both lengths; file and line.
        self._hashes, self._grades = array("Q"), array("f")
        self._sizes, self._places = array("q"), array("q")
        self._paths: list[str] = []

    def questions(self) -> np.ndarray:
        """What first questions are known by: uint64."""
        return np.array(self._asked, np.uint64)

    def add(self, found: _Found) -> None:
        self._waiting.append(found)
        if len(self._waiting) == _BATCH:
            self._count()

    def finish(self) -> None:
        self._count()
        self._report.duplicates = len(self._whole) - len(set(self._whole))
        self._join()
        self._report.lengths = np.array(self._lengths, np.int64)
        self._report.repeated = len(self._asked) - len(set(self._asked))
        self._report.contradicted = int(np.isin(np.array(self._turned), np.array(self._pairs)).sum())

    def _count(self) -> None:
        waiting, self._waiting = self._waiting, []
        for found, measured in zip(waiting, self._measure(waiting), strict=True):
            if isinstance(measured, str):
                self._report.fault(found.place, measured)
                continue
            key, question = np.frombuffer(comparison_hash(found.comparison), "<u8").tolist()
            if found.comparison.is_candidate:
                answer = found.comparison.responses[0].text.strip()
                self._hashes.extend([key, question, _number(digest(answer))])
                self._grades.append(measured.grades[0])
                self._sizes.extend([measured.alone[0], measured.whole[0]])
                if found.path not in self._paths[-1:]:
                    self._paths.append(found.path)
                self._places.extend([len(self._paths) - 1, found.record.line])
                continue
            self._whole.append(key)
            if len(found.comparison.responses) == 2:
                self._pairs.append(_ordered(found.comparison))
                self._turned.append(_ordered(found.comparison, turned=True))
            self._add_group(measured, question)

    def _measure(self, waiting: list[_Found]) -> Iterator[_Measured | str]:
        """The answers that are kept of each record, or why it is left out."""
        if self._encoder is None:
            for found in waiting:
                responses = found.comparison.responses
                kept = [responses[place] for place in spread([grade for _, grade in responses], self._most)]
                self._report.beyond_most += len(responses) - len(kept)
                before = sum(len(message.content) for message in found.comparison.prompt)
                alone = np.array([len(text) for text, _ in kept])
                self._report.sample = self._report.sample or _as_text(found)
                yield _Measured(np.array([grade for _, grade in kept]), alone, before + alone)
            return
        for found, stored in zip(waiting, self._encoder.encode([each.record for each in waiting]), strict=True):
            if stored.ids is None:
                yield stored.reason
                continue
            self._report.beyond_most += stored.counts["beyond_most"]
            self._report.shortened += stored.counts["shortened"]
            self._report.dropped_turns += stored.counts["dropped_turns"]
            answers = unpack(stored.ids)
            self._report.sample = self._report.sample or self._as_trained(found, answers.ids, answers.grades)
            alone = np.array([(ids >= TRAINED).sum() for ids in answers.ids])
            yield _Measured(answers.grades, alone, np.array([len(ids) for ids in answers.ids]))

    def _add_group(self, measured: _Measured, question: int) -> None:
        grades, alone, whole = measured
        self._report.prompts[len(grades)] += 1
        self._report.most = max(self._report.most, int(whole.sum()))
        is_better = grades[:, None] > grades[None, :]
        self._report.pairs += int(is_better.sum())
        self._report.longer += float((np.sign(alone[:, None] - alone[None, :]) + 1)[is_better].sum() / 2)
        self._lengths.extend(whole.tolist())
        self._asked.append(question)

    def _join(self) -> None:
        """Candidates to groups."""
        hashes = np.array(self._hashes, np.uint64).reshape(-1, 3)
        grades, sizes = np.array(self._grades, np.float32), np.array(self._sizes, np.int64).reshape(-1, 2)
        joined = join(hashes[:, 0], hashes[:, 2], grades, self._most)
        self._report.duplicates += joined.duplicates
        self._report.beyond_most += joined.beyond_most
        for first, reason in sorted(joined.left_out):
            path, line = self._places[2 * first : 2 * first + 2]
            self._report.fault(f"{self._paths[path]}:{line}", reason)
        bounds = np.flatnonzero(np.diff(joined.owners, prepend=-1))
        for rows in np.split(joined.rows, bounds[1:]) if len(bounds) else []:
            self._add_group(_Measured(grades[rows], sizes[rows, 0], sizes[rows, 1]), int(hashes[rows[0], 1]))

    def _as_trained(self, found: _Found, sequences: list[np.ndarray], grades: np.ndarray) -> str:
        """A record as the model reads it: the best answer, then the worst where there is another."""
        assert self._counting is not None
        lines = [found.place]
        for place in dict.fromkeys([int(grades.argmax()), int(grades.argmin())]):
            cells = sequences[place]
            trained = (cells >= TRAINED).tolist()
            shown = show_ids((cells % TRAINED).tolist(), trained, self._counting.tokenizer, _SAMPLE_TOKENS)
            lines.append(f"{grades[place]:g}: {shown}")
        return "\n".join(lines)


def _as_text(found: _Found) -> str:
    """The same where there is no tokenizer."""

    def shorten(text: str) -> str:
        return text if len(text) <= _SAMPLE_CHARACTERS else f"{text[:_SAMPLE_CHARACTERS]} …"

    responses = sorted(found.comparison.responses, key=lambda response: -response.grade)
    shown = dict.fromkeys([responses[0], responses[-1]])
    asked = [f"{message.role}: {shorten(message.content)}" for message in found.comparison.prompt]
    return "\n".join([found.place, *asked, *(f"{grade:g}: {shorten(text)}" for text, grade in shown)])


def _question(comparison: Comparison) -> int:
    return _number(comparison_hash(comparison)[8:])


def _ordered(comparison: Comparison, turned: bool = False) -> int:
    """What stands for a pair in its order."""
    responses = sorted(comparison.responses, key=lambda response: response.grade, reverse=not turned)
    prompt = [(message.role, message.content) for message in comparison.prompt]
    return _number(digest(json.dumps([prompt, [response.text.strip() for response in responses]])))


def _number(eight_bytes: bytes) -> int:
    return int.from_bytes(eight_bytes, "little")


def render_preferences(report: PreferenceReport, context: int | None, unit: str) -> str:
    """The report as a page of text.

    Args:
        unit: of lengths, tokens or characters.
    """
    prompts, answers = report.prompts.total(), sum(size * count for size, count in report.prompts.items())
    sizes = by_size(report.prompts, _MOST_ANSWERS, "answers a prompt")
    rows = [
        *report.file_rows(),
        ("recognised", counts(report.schemas)),
        ("prompts", f"{prompts:,} with {answers:,} answers{sizes}"),
        ("pairs", f"{report.pairs:,} of answers with different grades"),
        ("longer wins", f"{report.longer / max(1, report.pairs):.1%} of them" if report.pairs else "of none"),
        ("graded", f"{report.graded:,} records have grades, the others an order alone"),
        ("duplicates", f"{report.duplicates:,} records repeat an earlier one and count once"),
        ("same question", f"{report.repeated:,} prompts begin with the question of an earlier one"),
        ("contradicted", f"{report.contradicted:,} pairs stand elsewhere the other way round"),
        ("too many", f"{report.beyond_most:,} answers beyond --data.max_responses"),
    ]
    if context is not None:
        rows.append(
            ("shortened", f"{report.shortened:,} lose {report.dropped_turns:,} oldest turns at {context:,} tokens")
        )
    rows += report.fault_rows("left out")
    if report.held_out is not None:
        rows.append(("held out", f"{report.held_out:,} records, {report.overlap:,} with a question to be trained on"))
    lines = [f"{name:<15}{value}" for name, value in rows]
    if prompts:
        lines += ["", *histogram(report.lengths, unit), f"All answers to one prompt: at most {report.most:,} {unit}"]
    if report.sample:
        lines += ["", f"One record, {report.sample}"]
    return "\n".join(lines)
