"""Raw files or prepared directories to the corpora of one run: tokenizer, training documents, held-out documents.

Everything here is done by rank 0 first and found done by the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.building import Base, base_tokenizer
from engine.config import check_range
from engine.data.corpus import Corpus, open_corpus
from engine.data.prepare import preparation_key, prepare
from engine.data.progress import ProgressLine
from engine.data.shards import is_prepared, prepared_parts, read_manifest
from engine.data.sources import DataOptions, read_texts
from engine.launch import speak
from engine.ngram import NGram
from model.batch import IGNORE, PackedBatch
from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_training import coverage_that_fits, sample_lines, train_sentencepiece

# Where a run keeps the tokenizer it has trained; and, until an earlier run has been set aside, one trained anew.
TOKENIZER, NEW_TOKENIZER = "tokenizer", "tokenizer-new"

# Enough to learn a vocabulary of tens of thousands, little enough for a minute of work.
_TOKENIZER_CHARACTERS = 5_000_000
# Beyond this, counting n-grams takes more memory than the comparison is worth.
_BASELINE_TOKENS = 20_000_000


@dataclass
class DataConfig(DataOptions):
    """What is read, and how raw files become documents."""

    weights: list[float] = field(default_factory=list)
    """epochs of each source in one epoch of the mixture; by default 1 each"""
    workers: int | None = None
    """processes that tokenise; by default one a core"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("data", self, 1, "workers")


def find_tokenizer(config: DataConfig, given: str | None, base: Base, trained: Path) -> Tokenizer | None:
    """The tokenizer given, or the base's, or the prepared data's, or the one in `trained`; None if none is.

    Raises:
        InputError: the directory given holds none, or trained weights come without one.
    """
    found = base_tokenizer(base, given)
    if found is not None:
        return found
    for path in config.paths:
        if is_prepared(path):
            return Tokenizer.load(next(iter(prepared_parts(path)), Path(path)) / "tokenizer")
    return Tokenizer.load(trained) if trained.is_dir() else None


def train_tokenizer(config: DataConfig, base: Base, trained: Path, seed: int) -> Tokenizer:
    """A tokenizer for a preset, trained on the data and kept in `trained`.

    Raises:
        InputError: there is no text in the data.
    """
    speak(f"Training a tokenizer of {base.config.vocab_size} pieces on the data ({trained}).")
    lines, _ = sample_lines(read_texts(config.paths, config), _TOKENIZER_CHARACTERS, seed)
    if not lines:
        raise InputError(
            f"{', '.join(config.paths)}: there is no text to train a tokenizer on. Give --data other files."
        )
    coverage = coverage_that_fits(lines, base.config.vocab_size)
    model = train_sentencepiece(lines, base.config.vocab_size, coverage, is_limit_soft=True)
    beside = trained.with_name(f".{trained.name}")
    shutil.rmtree(beside, ignore_errors=True)
    Tokenizer.from_sentencepiece(model, {}).save(beside)
    beside.replace(trained)
    return Tokenizer.load(trained)


def open_data(config: DataConfig, tokenizer: Tokenizer, directory: Path) -> Corpus:
    """The training corpus: prepared directories as they are, raw files prepared on first use below `directory`.

    Raises:
        InputError: no data, data that cannot be read, or raw files beside prepared directories.
    """
    weights = config.weights or None
    return open_corpus(_prepared(config.paths, config, tokenizer, directory), weights, tokenizer.fingerprint)


def open_held_out(
    train: Corpus, fraction: float, paths: Sequence[str], config: DataConfig, tokenizer: Tokenizer, directory: Path
) -> tuple[Corpus, Corpus | None]:
    """Training documents and held-out ones, which share no text: from files of their own, or split off.

    Raises:
        InputError: nothing is left to train on.
    """
    if not paths:
        if fraction == 0:
            return train, None
        rest, held_out = train.split(fraction)
        if held_out.num_documents == 0:
            speak("There is a single document, so none is held out.")
            return train, None
        return rest, held_out
    held_out = open_corpus(_prepared(paths, config, tokenizer, directory), None, tokenizer.fingerprint)
    rest, overlap = train.without(held_out)
    if overlap:
        speak(f"{overlap} training documents are also held out; they are not trained on.")
    if not rest.num_documents:
        raise InputError(f"All training documents are held out by {', '.join(paths)}. Give --eval.data other files.")
    return rest, held_out


def _prepared(paths: Sequence[str], config: DataConfig, tokenizer: Tokenizer, directory: Path) -> list[Path]:
    if not paths:
        raise InputError("There is no data. Name files or directories with --data.")
    ready = [path for path in paths if is_prepared(path)]
    if len(ready) == len(paths):
        return [Path(path) for path in paths]
    if ready:
        raise InputError(
            f"{ready[0]} is prepared, {next(path for path in paths if path not in ready)} is raw. "
            "Prepare that one too: tools/prepare.py."
        )
    target = directory / "prepared" / preparation_key(paths, tokenizer, config)
    prepare(paths, tokenizer, target, config, workers=config.workers, progress=ProgressLine("Preparing"))
    _report(paths, target)
    return [target]


def _report(paths: Sequence[str], directory: Path) -> None:
    """What the files were, and what became of their documents.

    Raises:
        InputError: there is no document in them.
    """
    manifest = read_manifest(directory)
    dropped = [f"{manifest['short']:,} too short"] if manifest["short"] else []
    dropped += [f"{manifest['rejected']:,} malformed ({directory / 'rejects.jsonl'})"] if manifest["rejected"] else []
    dropped += [f"{manifest['ignored_files']:,} files of other kinds"] if manifest["ignored_files"] else []
    if not manifest["documents"]:
        why = f" ({', '.join(dropped)})" if dropped else ""
        raise InputError(f"{', '.join(paths)}: there is no document to read{why}. Give --data other files.")
    encodings = ", ".join(f"{count:,} {name}" for name, count in sorted(manifest["encodings"].items()))
    speak(f"Files read: {encodings}; {manifest['documents']:,} documents.")
    speak(f"Left out: {', '.join(dropped) or 'nothing'}.")
    if manifest["divided"]:
        longest = manifest["options"]["max_characters"]
        speak(f"Longer than --data.max_characters {longest} and stored in pieces: {manifest['divided']:,} documents.")


def print_baselines(train: Corpus, held_out: Iterable[PackedBatch], vocab_size: int) -> dict[str, float]:
    """Held-out loss of smoothed bigram and trigram models of the training tokens, on the model's own targets.

    Returns:
        {"bigram": nats a token, "trigram": ...}; empty where the corpus is too large to count.
    """
    if train.num_tokens > _BASELINE_TOKENS:
        return {}
    documents = [train.read(int(document)) for document in train.documents()]
    pieces = [piece for batch in held_out for piece in _pieces(batch)]
    losses: dict[str, float] = {}
    for name, order in (("bigram", 2), ("trigram", 3)):
        total, count = NGram(documents, order, vocab_size).loss(pieces)
        losses[name] = total / max(1, count)
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    speak(f"Held-out loss to beat (Kneser-Ney over the same tokens): {shown}.")
    return losses


def _pieces(batch: PackedBatch) -> list[np.ndarray]:
    """The documents of a batch, each with the target after its last token if there is one."""
    bounds = batch.cu_seqlens[: batch.num_documents + 1].tolist()
    pieces = []
    for begin, end in pairwise(bounds):
        last = batch.targets[end - 1 : end]
        ids = batch.tokens[begin:end].tolist() + [token for token in last.tolist() if token != IGNORE]
        pieces.append(np.array(ids))
    return pieces


def describe(corpus: Corpus, held_out: Corpus | None) -> str:
    """One line on what is trained on."""
    parts = [f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens to train on"]
    if corpus.num_duplicates:
        parts.append(f"{corpus.num_duplicates:,} exact duplicates dropped")
    if held_out is not None:
        parts.append(f"{held_out.num_documents:,} documents, {held_out.num_tokens:,} tokens held out")
    return "; ".join(parts) + "."
