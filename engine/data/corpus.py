"""Prepared directories opened as one corpus: which documents there are, which of them are trained on.

Documents are numbered through all directories. Parts of one preparation are put back into the order of the whole,
so a corpus prepared in n parts is the corpus prepared in one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from engine.data.duplicates import find_duplicates
from engine.data.selection import Selection
from engine.data.shards import Prepared, Shard, TokenFiles, fingerprint, prepared_parts, token_path
from engine.launch import speak
from model.errors import InputError

_SCAN = 1 << 20  # hashes looked at in one go
# A held-out share is doubted that differs from the one asked for by more than this factor, or has fewer documents.
_FAR, _FEW = 3, 20

Kind = Literal["texts", "conversations", "preferences"]


class Store:
    """All documents of some prepared directories, by number, with every duplicate still there.

    Attributes:
        sources: the paths that were prepared, in order.
        source_bounds: int64 [S+1]; source s holds the documents from bound s to bound s+1.
        kind: texts, or conversations, of which some ids are trained.
        fingerprint: over the texts, their order and the tokenizer.
    """

    def __init__(self, groups: Sequence[Sequence[Prepared]]) -> None:
        """`groups`: the directories of one preparation each."""
        self.prepared = [prepared for group in groups for prepared in group]
        self._places: list[tuple[Prepared, Shard]] = []
        self.sources: list[str] = []
        counts: list[int] = []
        digests: list[str] = []
        for group in groups:
            entries = {
                shard.unit: (prepared, shard, entry)
                for prepared in group
                for shard, entry in zip(prepared.shards, prepared.manifest["units"], strict=True)
            }
            first = len(counts)
            self.sources += group[0].manifest["sources"]
            counts += [0] * len(group[0].manifest["sources"])
            for _, (prepared, shard, entry) in sorted(entries.items()):
                self._places.append((prepared, shard))
                digests.append(entry["digest"])
                for source, documents in entry["sources"]:
                    counts[first + source] += documents
        self._files = TokenFiles()
        self._first = np.cumsum([0, *(shard.documents for _, shard in self._places)])
        self.source_bounds = np.cumsum([0, *counts])
        manifest = self.prepared[0].manifest
        self.tokenizer_fingerprint: str = manifest["tokenizer"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.kind: Kind = manifest.get("kind", "texts")
        self.fingerprint = fingerprint(manifest.get("encoder", self.tokenizer_fingerprint), digests)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for _, shard in self._places)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each document: int64, the shape of `documents` [N]."""
        begin, end = np.empty(len(documents), np.int64), np.empty(len(documents), np.int64)
        for prepared, rows, chosen in self._rows(documents):
            begin[chosen] = prepared.offsets[rows]
            end[chosen] = prepared.offsets[rows + 1]
        return end - begin

    def characters(self, documents: np.ndarray) -> np.ndarray:
        """Unicode code points of each document: int64 [N]."""
        found = np.empty(len(documents), np.int64)
        for prepared, rows, chosen in self._rows(documents):
            found[chosen] = prepared.characters[rows]
        return found

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document, as stored (uint16 or uint32)."""
        place = int(np.searchsorted(self._first, document, side="right")) - 1
        prepared, shard = self._places[place]
        row = shard.first_row + document - int(self._first[place])
        begin, end = int(prepared.offsets[row]), int(prepared.offsets[row + 1])
        end = end if stop is None else min(end, begin + stop)
        size = prepared.dtype.itemsize
        offset = (begin + start - shard.first_token) * size
        path = token_path(prepared.directory, shard.unit)
        return np.frombuffer(self._files.read(path, offset, (end - begin - start) * size), prepared.dtype)

    def hashes(self, first: int, last: int) -> np.ndarray:
        """uint64 [last - first, 2] of a run of documents."""
        pieces = [np.empty((0, 2), np.uint64)]
        place = int(np.searchsorted(self._first, first, side="right")) - 1
        while first < last:
            prepared, shard = self._places[place]
            end = min(last, int(self._first[place + 1]))
            row = shard.first_row - int(self._first[place])
            pieces.append(prepared.hashes[row + first : row + end])
            first, place = end, place + 1
        return np.concatenate(pieces)

    def tokens_between(self, first: int, last: int) -> int:
        """Tokens of the documents [first, last)."""
        total = 0
        for place, (prepared, shard) in enumerate(self._places):
            begin, end = np.clip([first, last], self._first[place], self._first[place + 1])
            row = shard.first_row - self._first[place]
            if begin < end:
                total += int(prepared.offsets[row + end]) - int(prepared.offsets[row + begin])
        return total

    def _rows(self, documents: np.ndarray) -> list[tuple[Prepared, np.ndarray, np.ndarray]]:
        """For each directory: rows in it, and where in `documents` they were asked for."""
        places = np.searchsorted(self._first, documents, side="right") - 1
        owners = self._owners[places]
        rows = documents - self._first[places] + self._first_rows[places]
        found = []
        for owner in np.unique(owners):
            chosen = np.flatnonzero(owners == owner)
            found.append((self.prepared[owner], rows[chosen], chosen))
        return found

    @cached_property
    def _owners(self) -> np.ndarray:
        numbers = {id(prepared): number for number, prepared in enumerate(self.prepared)}
        return np.array([numbers[id(prepared)] for prepared, _ in self._places], np.int64)

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.array([shard.first_row for _, shard in self._places], np.int64)


C = TypeVar("C", bound="Corpus")


class Corpus:
    """Documents to train on or to evaluate, source by source.

    Attributes:
        sources: names of the sources.
        kind: texts, conversations, or preferences, whose documents are groups of answers (`groups.py`).
        weights: epochs of each source in one epoch of the mixture.
        num_documents, num_tokens: of the chosen documents, each counted once.
        num_duplicates: documents of the store that repeat an earlier one and are left out.
        fingerprint: over texts, order, tokenizer, choice and weights; training order depends on nothing else of it.
        vocab_size, tokenizer_fingerprint: of the tokenizer that made the ids.
    """

    def __init__(
        self, store: Store, selections: Sequence[Selection], weights: Sequence[Fraction], num_duplicates: int
    ) -> None:
        self.store = store
        self.selections = list(selections)
        self.weights = list(weights)
        self.num_duplicates = num_duplicates
        self.sources = store.sources
        self.kind = store.kind
        self.vocab_size = store.vocab_size
        self.tokenizer_fingerprint = store.tokenizer_fingerprint

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.selections))

    @cached_property
    def source_tokens(self) -> list[int]:
        """Tokens of each source's chosen documents."""
        return [self._tokens(selection) for selection in self.selections]

    @property
    def num_tokens(self) -> int:
        return sum(self.source_tokens)

    @property
    def epoch_tokens(self) -> int:
        """Tokens of one epoch of the mixture, up to rounding."""
        return int(sum(weight * tokens for weight, tokens in zip(self.weights, self.source_tokens, strict=True)))

    @cached_property
    def fingerprint(self) -> str:
        digest = blake2b(self.store.fingerprint.encode(), digest_size=16)
        for selection, weight in zip(self.selections, self.weights, strict=True):
            digest.update(f"{selection.first} {selection.last} {selection.is_listed_chosen} {weight};".encode())
            digest.update(selection.listed.astype("<i8").tobytes())
        return digest.hexdigest()

    def documents(self) -> np.ndarray:
        """All chosen documents by number, ascending: int64 [num_documents]."""
        return np.concatenate([selection[np.arange(len(selection))] for selection in self.selections])

    def split(self: C, fraction: float) -> tuple[C, C]:
        """Documents to train on, and about `fraction` of them held out.

        Whether a document is held out depends on its text alone (its first question, for a conversation), so it stays
        where it is when the corpus grows, is reordered or is prepared in parts. Where there are two texts or
        questions or more, each side gets one at least. A share far from `fraction`, or of few documents, is said.
        """
        assert 0 <= fraction < 1
        held_out = self._below(int(fraction * 2.0**64)) if fraction else np.empty(0, np.int64)
        if fraction and self.num_documents > 1 and not 0 < len(held_out) < self.num_documents:
            every = self.documents()
            keys = np.concatenate([self.store.hashes(document, document + 1)[:, 1] for document in every])
            bound = np.unique(keys)[1:][-1 if len(held_out) else 0 :][:1]
            held_out = every[keys < bound] if len(bound) else every[:0]
        rest, chosen = self._without(held_out), self._only(held_out)
        if warning := doubt(rest, chosen, fraction):
            speak(warning)
        return rest, chosen

    def without(self: C, held_out: Corpus) -> tuple[C, int]:
        """This corpus without the texts of another (the first questions, of conversations and preferences), and how
        many documents that costs."""
        unwanted = held_out.store.hashes(0, len(held_out.store))
        if self.kind != "texts":
            questions = np.unique(unwanted[:, 1])
            asked = [np.flatnonzero(np.isin(hashes[:, 1], questions)) + first for first, hashes in self._scan()]
            rest = self._without(np.concatenate(asked))
            return rest, self.num_documents - rest.num_documents
        halves = np.unique(unwanted[:, 0])
        whole = {row.tobytes() for row in unwanted}
        found: list[int] = []
        for first, hashes in self._scan():
            candidates = np.flatnonzero(np.isin(hashes[:, 0], halves))
            found += [first + row for row in candidates.tolist() if hashes[row].tobytes() in whole]
        rest = self._without(np.array(found, np.int64))
        return rest, self.num_documents - rest.num_documents

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document by its number, as stored (uint16 or uint32)."""
        return self.store.read(document, start, stop)

    def _below(self, threshold: int) -> np.ndarray:
        """Chosen documents whose hash is below a bound, ascending."""
        found = [np.empty(0, np.int64)]
        for first, hashes in self._scan():
            found.append(first + np.flatnonzero(hashes[:, 1] < np.uint64(threshold)))
        candidates = np.concatenate(found)
        return np.setdiff1d(candidates, self._left_out(candidates), assume_unique=True)

    def _scan(self) -> Iterator[tuple[int, np.ndarray]]:
        """Hashes of the whole store, run by run, each with the number of its first document."""
        for first in range(0, len(self.store), _SCAN):
            yield first, self.store.hashes(first, min(len(self.store), first + _SCAN))

    def _left_out(self, documents: np.ndarray) -> np.ndarray:
        """Those of some documents (ascending) that are not chosen."""
        left = [np.empty(0, np.int64)]
        for selection in self.selections:
            begin, end = np.searchsorted(documents, [selection.first, selection.last])
            is_listed = np.isin(documents[begin:end], selection.listed)
            left.append(documents[begin:end][is_listed != selection.is_listed_chosen])
        return np.concatenate(left)

    def _without(self: C, documents: np.ndarray) -> C:
        rest = [selection.without(documents) for selection in self.selections]
        return type(self)(self.store, rest, self.weights, self.num_duplicates)

    def _only(self: C, documents: np.ndarray) -> C:
        chosen = []
        for selection in self.selections:
            begin, end = np.searchsorted(documents, [selection.first, selection.last])
            chosen.append(Selection(selection.first, selection.last, documents[begin:end], is_listed_chosen=True))
        return type(self)(self.store, chosen, [Fraction(1)] * len(chosen), 0)

    def _tokens(self, selection: Selection) -> int:
        listed = int(self.store.lengths(selection.listed).sum())
        if selection.is_listed_chosen:
            return listed
        return self.store.tokens_between(selection.first, selection.last) - listed


def doubt(train: Corpus, held_out: Corpus, fraction: float) -> str:
    """A sentence on a held-out share far from the fraction asked for, or too small to tell much; "" for none."""
    tokens = held_out.num_tokens
    if not tokens:
        return ""
    share = tokens / (tokens + train.num_tokens)
    is_far = not fraction / _FAR <= share <= fraction * _FAR
    if not is_far and held_out.num_documents >= _FEW:
        return ""
    unit = {"texts": "documents", "preferences": "prompts"}.get(train.kind, train.kind)
    every = held_out.num_documents + train.num_documents
    said = f"{held_out.num_documents:,} of {every:,} {unit} are held out, {share:.2%} of the tokens"
    if share > fraction * _FAR:
        advice = "which are not trained on. Give --eval.data files of its own."
    else:
        advice = "on which a loss is uncertain. Raise --eval.fraction, or give --eval.data files of its own."
    return f"Warning: {said} where --eval.fraction asks for {fraction:.2%}, {advice}"


def open_corpus(
    directories: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    tokenizer_fingerprint: str | None = None,
    kind: Kind = "texts",
) -> Corpus:
    """Open prepared directories as one corpus, without exact duplicates.

    Args:
        directories: as `prepare` made them; a directory that holds parts stands for all of them.
        weights: epochs of each source in one epoch of the mixture; one number a source, in the order of
            `Corpus.sources`. A source is a path that was given to `prepare`.
        tokenizer_fingerprint: refuse ids of another tokenizer.
        kind: refuse documents of another kind.
    Raises:
        InputError: not prepared, damaged, listed twice, a part missing, different tokenizers, or no document.
    """
    groups: dict[str, list[Prepared]] = {}
    seen: set[Path] = set()
    for directory in directories:
        parts = list(prepared_parts(directory)) or [Path(directory)]
        for part in parts:
            if part.resolve() in seen:
                raise InputError(f"{part}: listed twice. List it once; --data.weights repeats a source.")
            seen.add(part.resolve())
            prepared = Prepared(part)
            groups.setdefault(prepared.manifest["plan"], []).append(prepared)
    if not groups:
        raise InputError("There is no data. Name prepared directories.")
    for group in groups.values():
        _check_parts(group)
    everything = [prepared for group in groups.values() for prepared in group]
    wanted = tokenizer_fingerprint or everything[0].manifest["tokenizer"]
    for prepared in everything:
        _check_kind(prepared, kind)
        if prepared.manifest["tokenizer"] != wanted:
            raise InputError(
                f"{prepared.directory}: its ids are of another tokenizer. Prepare it again with this one, or use "
                f"the tokenizer in {prepared.directory / 'tokenizer'}."
            )
    store = Store(list(groups.values()))
    if not len(store):
        raise InputError(
            f"{directories[0]}: there is no document in it. See its rejects.jsonl, and --data.min_characters."
        )
    duplicates = find_duplicates(store, everything[0].directory)
    bounds = store.source_bounds
    selections = [
        Selection(int(first), int(last), np.empty(0, np.int64)).without(duplicates)
        for first, last in itertools.pairwise(bounds)
    ]
    return Corpus(store, selections, source_weights(weights, store.sources), len(duplicates))


def _check_kind(prepared: Prepared, kind: Kind) -> None:
    found = prepared.manifest.get("kind", "texts")
    if found != kind:
        tool = {"texts": "tools/pretrain.py", "conversations": "tools/sft.py"}.get(found, "tools/rm.py")
        raise InputError(f"{prepared.directory}: it holds {found}, not {kind}. Give it to {tool}, or other --data.")


def _check_parts(group: Sequence[Prepared]) -> None:
    """All parts of one preparation, each once."""
    parts = [tuple(prepared.manifest["part"]) for prepared in group]
    of = {count for _, count in parts}
    if len(of) > 1:
        raise InputError(f"{group[0].directory}: listed beside parts of another division of the same data. Keep one.")
    (count,) = of
    numbers = sorted(number for number, _ in parts)
    for first, second in itertools.pairwise(numbers):
        if first == second:
            raise InputError(f"{group[0].directory}: part {first} of {count} is listed twice. List each part once.")
    missing = sorted(set(range(1, count + 1)) - set(numbers))
    if missing:
        raise InputError(
            f"{group[0].directory}: part {missing[0]} of {count} is missing. List all parts, or prepare it with "
            f"--part {missing[0]}/{count}."
        )


def source_weights(weights: Sequence[float] | None, sources: Sequence[str]) -> list[Fraction]:
    if not weights:
        return [Fraction(1)] * len(sources)
    if len(weights) != len(sources):
        raise InputError(
            f"--data.weights has {len(weights)} numbers for {len(sources)} sources ({', '.join(sources)}). "
            "Give each source one."
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise InputError("--data.weights: every weight is a number above 0. Leave a source out of --data instead.")
    # By their decimal digits, so that 0.1 is a tenth.
    return [Fraction(str(weight)) for weight in weights]
