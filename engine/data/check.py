"""What is in raw files or prepared directories, before anything is trained on them."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data.check_files import FilesReport, leave_out, read_files
from engine.data.corpus import Store, open_corpus
from engine.data.encoders import TextTokenizer
from engine.data.prepare import Progress
from engine.data.report import histogram, keys, unless_zero
from engine.data.shards import is_prepared, text_hash
from engine.data.sources import ReadOptions, settle
from model.errors import InputError
from model.tokenizer import Tokenizer

_SAMPLE_CHARACTERS = 200
_SCAN = 1 << 20


@dataclass
class Report(FilesReport):
    """Facts about a corpus; duplicates are counted in documents, and so is everything else but characters and tokens.

    lengths: of each document, in tokens if there is a tokenizer, else in characters: [documents].
    tokens: with bos and eos as they are stored; None without a tokenizer.
    short: dropped for too few characters. divided: longer than the longest that is stored in one piece.
    sample: beginning of a document, after a round through the tokenizer where there is one.
    """

    documents: int = 0
    characters: int = 0
    duplicates: int = 0
    short: int = 0
    divided: int = 0
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    sample: str = ""


def check(
    paths: Sequence[str],
    tokenizer: TextTokenizer | None = None,
    options: ReadOptions | None = None,
    held_out: Sequence[str] = (),
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Read a corpus through and report on it.

    Args:
        paths: raw files, directories and globs, or prepared directories; not both.
        tokenizer: to count tokens of raw files; prepared directories have theirs.
        held_out: raw or prepared, to be looked for in `paths`.
        verify: compare every byte of prepared shards with what was written.
    Raises:
        InputError: as `prepare` and `open_corpus`, but of a raw file that cannot be read: the report names it.
    """
    options = options or ReadOptions()
    if all(map(is_prepared, paths)) and paths:
        report, hashes = _check_prepared(paths, verify)
    else:
        for path in filter(is_prepared, paths):
            raise InputError(
                f"{path}: prepared, beside raw files. Check prepared directories and raw files separately."
            )
        report, hashes = _check_raw(paths, tokenizer, options, progress)
    if held_out:
        other = _hashes_of(held_out, options, report)
        report.held_out = len(other)
        report.overlap = int(np.isin(keys(other), keys(hashes)).sum())
    return report


def _check_prepared(paths: Sequence[str], verify: bool) -> tuple[Report, np.ndarray]:
    corpus = open_corpus(paths)
    store = corpus.store
    report = Report(documents=len(store), tokens=store.num_tokens, duplicates=corpus.num_duplicates)
    # A file that is larger than a unit may lie in several parts, and every part knows of all ignored files.
    files: dict[str, tuple[str, str]] = {}
    for prepared in store.prepared:
        if verify:
            prepared.verify()
        manifest = prepared.manifest
        report.ignored_files = max(report.ignored_files, manifest["ignored_files"])
        report.characters += manifest["characters"]
        report.short += manifest["short"]
        report.divided += manifest["divided"]
        for line in _json_lines(prepared.directory / "files.jsonl"):
            files[line["file"]] = line["encoding"], line["format"]
        for line in _json_lines(prepared.directory / "rejects.jsonl"):
            report.fault(f"{line['file']}:{line['line']}", line["reason"])
    report.files = len(files)
    report.encodings.update(encoding for encoding, _ in files.values())
    report.formats.update(kind for _, kind in files.values())
    report.lengths = np.concatenate(
        [store.lengths(np.arange(first, min(first + _SCAN, len(store)))) for first in range(0, len(store), _SCAN)]
    )
    tokenizer = Tokenizer.load(store.prepared[0].directory / "tokenizer")
    report.sample = tokenizer.decode(store.read(0, 0, _SAMPLE_CHARACTERS).tolist(), skip_special=True)[
        :_SAMPLE_CHARACTERS
    ]
    return report, _stored_hashes(store)


def _json_lines(path: Path) -> list[dict]:
    # Not `splitlines`: a file's name may hold U+2028, which JSON leaves as it is.
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _check_raw(
    paths: Sequence[str],
    tokenizer: TextTokenizer | None,
    options: ReadOptions,
    progress: Callable[[Progress], None] | None,
) -> tuple[Report, np.ndarray]:
    report = Report(tokens=None if tokenizer is None else 0)
    hashes, lengths = bytearray(), array("I")
    for file, record in read_files(paths, options, report, progress):
        record = settle(record, options)
        if record.text is None:
            leave_out(report, options, file, record.line, record.reason)
        elif options.is_short(record):
            report.short += 1
        else:
            report.documents += 1
            report.characters += len(record.text)
            report.divided += record.is_first and not record.is_last
            hashes += text_hash(record.text)
            lengths.append(_length(record.text, report, tokenizer))
    report.lengths = np.array(lengths, np.int64)
    found = np.frombuffer(bytes(hashes), "<u8").reshape(-1, 2)
    report.duplicates = len(found) - len(np.unique(keys(found)))
    return report, found


def _length(text: str, report: Report, tokenizer: TextTokenizer | None) -> int:
    """Tokens of a document, or its characters; adds to the report what is counted by the way."""
    if tokenizer is None:
        report.sample = report.sample or text[:_SAMPLE_CHARACTERS]
        return len(text)
    (ids,) = tokenizer.encode_batch([text])
    if not report.sample and isinstance(tokenizer, Tokenizer):
        report.sample = tokenizer.decode(ids[:_SAMPLE_CHARACTERS])[:_SAMPLE_CHARACTERS]
    length = len(ids) + tokenizer.add_bos + 1
    report.tokens = (report.tokens or 0) + length
    return length


def _hashes_of(paths: Sequence[str], options: ReadOptions, report: Report) -> np.ndarray:
    if all(map(is_prepared, paths)):
        return _stored_hashes(open_corpus(paths).store)
    other, hashes = _check_raw(paths, None, options, None)
    report.unusable += other.unusable
    return hashes


def _stored_hashes(store: Store) -> np.ndarray:
    return store.hashes(0, len(store))


def render(report: Report) -> str:
    """The report as a page of text."""
    unit = "characters" if report.tokens is None else "tokens"
    rows = [
        *report.file_rows(),
        ("documents", f"{report.documents:,}" + unless_zero(report.divided, "stored in several pieces")),
        ("characters", f"{report.characters:,}"),
    ]
    if report.tokens is not None:
        rows.append(("tokens", f"{report.tokens:,} ({report.characters / max(1, report.tokens):.3f} characters each)"))
    rows += [
        ("duplicates", f"{report.duplicates:,} documents repeat an earlier one and are trained on once"),
        ("too short", f"{report.short:,}"),
        *report.fault_rows("rejected"),
    ]
    if report.held_out is not None:
        rows.append(("held out", f"{report.held_out:,} documents, {report.overlap:,} of them also to be trained on"))
    lines = [f"{name:<12}{value}" for name, value in rows]
    if report.documents:
        lines += ["", *histogram(report.lengths, unit), "", "The first document begins:", report.sample]
    return "\n".join(lines)
