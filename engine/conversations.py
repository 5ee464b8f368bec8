"""Raw conversations to the corpora of one run, as `corpora.py` does for texts: prepared, held out, and said.

Everything here is done by rank 0 first and found done by the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from engine.config import check_range
from engine.data.conversation_files import ConversationOptions
from engine.data.corpus import Corpus, open_corpus
from engine.data.encoders import ChatEncoder
from engine.data.prepare import preparation_key, prepare
from engine.data.progress import ProgressLine
from engine.data.report import reject_reasons, what_else
from engine.data.shards import TRAINED, is_prepared, read_manifest
from engine.launch import speak
from model.chat import ChatTemplate
from model.errors import InputError
from model.tokenizer import Tokenizer

# Among so many conversations one is looked for that is whole.
_LOOKED_AT = 1000
# Reasons that are said; all of them are in rejects.jsonl.
_REASONS = 3
C = TypeVar("C", bound=Corpus)


@dataclass
class ConversationDataConfig(ConversationOptions):
    """What is read, and how records become conversations."""

    paths: list[str] = field(default_factory=list)
    """files, directories or glob patterns of conversations, or directories prepared from them"""
    weights: list[float] = field(default_factory=list)
    """epochs of each source in one epoch of the mixture; by default 1 each"""
    workers: int | None = None
    """processes that tokenise; by default one a core"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("data", self, 1, "workers")


def open_conversations(
    config: ConversationDataConfig, template: ChatTemplate, tokenizer: Tokenizer, context: int, directory: Path
) -> Corpus:
    """The conversations to train on, tokenised under a template and shortened to the context.

    Raw files are prepared on first use below `directory`/prepared; what was left out or shortened is said.

    Raises:
        InputError: no data, data that cannot be read, no conversation in it, texts instead, raw files beside prepared
            directories, or ones prepared for another template or context.
    """
    return _open(config.paths, config.weights, config, ChatEncoder(template, tokenizer, context), directory)


def open_held_out_conversations(
    train: Corpus,
    fraction: float,
    paths: Sequence[str],
    config: ConversationDataConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    context: int,
    directory: Path,
) -> tuple[Corpus, Corpus | None]:
    """Conversations to train on and held-out ones, of which none begin with the same question.

    Args:
        fraction: of the first questions, where there are no held-out files.
        paths: held-out files, or nothing. Conversations that begin with one of their questions are taken out of
            training, and counted.
    Raises:
        InputError: as `open_conversations`; or nothing is left to train on.
    """
    held_out = None
    if paths:
        held_out = _open(paths, [], config, ChatEncoder(template, tokenizer, context), directory, "--eval.data")
    return hold_out(train, fraction, paths, held_out, "conversations")


def hold_out(train: C, fraction: float, paths: Sequence[str], held_out: C | None, unit: str) -> tuple[C, C | None]:
    """What to train on and what is held out, of which none begin with the same question.

    Args:
        held_out: what the files of `paths` hold; None to split a fraction of the first questions off.
        unit: what documents are called.
    Raises:
        InputError: nothing is left to train on.
    """
    if held_out is not None:
        rest, overlap = train.without(held_out)
        if overlap:
            speak(f"{overlap:,} training {unit} begin with a held-out question; they are not trained on.")
        if not rest.num_documents:
            raise InputError(
                f"All training questions are held out by {', '.join(paths)}. Give --eval.data other files."
            )
        return rest, held_out
    rest, held_out = train.split(fraction)
    if fraction and not held_out.num_documents:
        speak(f"All {unit} begin with the same question, so none is held out.")
    return rest, held_out if held_out.num_documents else None


def _open(
    paths: Sequence[str],
    weights: list[float],
    config: ConversationDataConfig,
    encoder: ChatEncoder,
    directory: Path,
    option: str = "--data",
) -> Corpus:
    if not paths:
        raise InputError("There is no data. Name files or directories with --data.")
    ready = [path for path in paths if is_prepared(path)]
    if not ready:
        target = directory / "prepared" / preparation_key(paths, encoder, config)
        prepare(paths, encoder, target, config, workers=config.workers, progress=ProgressLine("Preparing"))
        _report(paths, target, option)
        ready = [str(target)]
    elif len(ready) < len(paths):
        raw = next(path for path in paths if path not in ready)
        raise InputError(f"{ready[0]} is prepared, {raw} is raw. Give the raw files of both.")
    corpus = open_corpus(ready, weights or None, encoder.tokenizer.fingerprint, "conversations")
    for prepared in corpus.store.prepared:
        for name, wanted in (("template", "another chat template"), ("context", "another --train.context")):
            if prepared.manifest[name] != encoder.facts[name]:
                raise InputError(f"{prepared.directory}: it was prepared for {wanted}. Give the raw files.")
    return corpus


def _report(paths: Sequence[str], directory: Path, option: str) -> None:
    """What the files were, and what became of their conversations.

    Raises:
        InputError: there is none in them.
    """
    manifest = read_manifest(directory)
    rejects = directory / "rejects.jsonl"
    skipped = [f"{count:,} x {reason}" for reason, count in reject_reasons(rejects)]
    if not manifest["documents"]:
        why = f" ({skipped[0]})" if skipped else ""
        remedy = what_else(rejects, manifest["context"], option)
        raise InputError(f"{', '.join(paths)}: there is no conversation{why}. {remedy}")
    encodings = ", ".join(f"{count:,} {name}" for name, count in sorted(manifest["encodings"].items()))
    speak(
        f"Files read: {encodings}; {manifest['documents']:,} conversations with {manifest['answers']:,} answers; "
        f"{manifest['trained']:,} of {manifest['tokens']:,} tokens are trained."
    )
    dropped = [f"{manifest['ignored_files']:,} files of other kinds"] if manifest["ignored_files"] else []
    if skipped:
        more = ", ..." if len(skipped) > _REASONS else ""
        dropped.append(f"{manifest['rejected']:,} records ({', '.join(skipped[:_REASONS])}{more}; see {rejects})")
    if manifest["unanswered"]:
        dropped.append(f"the last question of {manifest['unanswered']:,} conversations, which nobody answers")
    speak(f"Left out: {', '.join(dropped) or 'nothing'}.")
    if manifest["shortened"] or manifest["cut"]:
        speak(
            f"Longer than the context of {manifest['context']:,} tokens: {manifest['shortened']:,} conversations lost "
            f"their {manifest['dropped_turns']:,} oldest turns, {manifest['cut']:,} answers were cut."
        )


def first_whole(corpus: Corpus, ends: Sequence[int]) -> int:
    """The first conversation whose last answer was not cut, or the first of all where none soon is whole; `ends`: ids
    that end an answer."""
    found = [int(document) for document in corpus.documents()[:_LOOKED_AT]]

    def is_whole(document: int) -> bool:
        stored = corpus.read(document)
        trained = stored[stored >= TRAINED] % TRAINED
        return len(trained) > 0 and int(trained[-1]) in ends

    return next(filter(is_whole, found), found[0])


def describe_conversations(corpus: Corpus, held_out: Corpus | None) -> str:
    """One line on what is trained on."""
    parts = [f"{corpus.num_documents:,} conversations, {corpus.num_tokens:,} tokens to train on"]
    if corpus.num_duplicates:
        parts.append(f"{corpus.num_duplicates:,} exact duplicates dropped")
    if held_out is not None:
        parts.append(f"{held_out.num_documents:,} conversations, {held_out.num_tokens:,} tokens held out")
    return "; ".join(parts) + "."
