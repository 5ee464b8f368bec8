"""Train a SentencePiece tokenizer on raw text, or extend a base's with pieces of the text.

    python tools/train_tokenizer.py --data PATH... --vocab_size 32000 --out DIR
    python tools/train_tokenizer.py --data PATH... --extend BASE --vocab_size 48000 --out DIR [--model BASE]

Without --data the bundled sample is read. --model also writes that model to --out, with rows for the new pieces.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.data.sources import ReadOptions, list_files, read_texts
from engine.files import explain, new_directory, require_new
from engine.launch import run, speak
from engine.out_directory import require_apart
from engine.publish import require_model
from model.errors import InputError
from model.hf import load_config
from model.tokenizer import FILES, Tokenizer, has_tokenizer
from model.tokenizer_extension import domain_pieces, extend_tokenizer, open_base
from model.tokenizer_report import HeldOutLines, TokenizerReport, measure
from model.tokenizer_resize import resize_model
from model.tokenizer_training import Sample, sample_lines, train_sentencepiece
from samples.knowledge import load_knowledge
from samples.render import render_pretraining


@dataclass
class DataOptions(ReadOptions):
    """Which files, and how they are read."""

    paths: list[str] = field(default_factory=list)
    """files, directories or globs of raw text; empty: the bundled sample"""


@dataclass
class TrainTokenizer:
    """Train a tokenizer on raw text, or extend a base's."""

    data: DataOptions = field(default_factory=DataOptions)
    out: str = "ckpt/tokenizer"
    """directory to write, a new one"""
    vocab_size: int = 4096
    """ids in all; of the base and the new pieces together, with --extend"""
    extend: str | None = None
    """directory of a base's tokenizer.model, whose ids are kept"""
    model: str | None = None
    """with --extend: directory of the base's weights, written to --out with rows for the new pieces"""
    character_coverage: float = 0.9999
    """share of the text's characters that get a piece; rarer ones are encoded in bytes"""
    max_characters: int = 20_000_000
    """characters to learn from; of longer texts, a uniform sample of lines"""
    seed: int = 0
    """of that sample"""


def main(config: TrainTokenizer) -> None:
    require_apart(config.out, {"--extend": config.extend, "--model": config.model})
    if config.model and not config.extend:
        raise InputError("--model is resized to an extended vocabulary. Give --extend its tokenizer's directory too.")
    if config.extend:
        open_base(config.extend, config.vocab_size)  # before hours of reading
    if config.model:
        load_config(require_model(config.model), "lm")
    if config.data.paths:
        list_files(config.data.paths)
    out = Path(config.out)
    if not _may_be_repeated(config):
        require_new(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: {explain(error)}") from None
    speak("Reading the text")
    held_out = HeldOutLines(_texts(config))
    lines, sample = sample_lines(held_out, config.max_characters, config.seed)
    speak(f"Learning from {sample.used_characters:,} characters")
    if config.extend:
        _extend(config, lines)
    else:
        model = train_sentencepiece(lines, config.vocab_size, config.character_coverage)
        with new_directory(out, may_repeat=True) as folder:
            Tokenizer.from_sentencepiece(model, {}).save(folder)
    tokenizer = Tokenizer.load(config.out)
    _print_vocabulary(config, tokenizer, sample)
    if held_out.lines:  # none where the text has fewer than fifty lines
        _print_compression(tokenizer, config.extend, held_out.lines)
    speak("Reading the text again, to see that it comes back")
    _print_round_trip(measure(tokenizer, _at_most(_texts(config), config.max_characters)))


def _may_be_repeated(config: TrainTokenizer) -> bool:
    """Whether --out holds a tokenizer alone, of the size asked for: the same command may have made it."""
    out = Path(config.out)
    if config.model or not has_tokenizer(out) or {path.name for path in out.iterdir()} - {*FILES}:
        return False
    with contextlib.suppress(InputError):
        if Tokenizer.load(out).vocab_size == config.vocab_size:
            speak(f"{out} holds a tokenizer of this size. It stays; whether it is the same is seen at the end.")
            return True
    return False


def _texts(config: TrainTokenizer) -> Iterable[str]:
    if config.data.paths:
        return read_texts(config.data.paths, config.data)
    return (document.text for document in render_pretraining(load_knowledge())[0])


def _extend(config: TrainTokenizer, lines: list[str]) -> None:
    assert config.extend is not None
    candidates = domain_pieces(config.extend, lines, config.vocab_size, config.character_coverage)
    rows = None
    with new_directory(Path(config.out), may_repeat=not config.model) as folder:
        extension = extend_tokenizer(config.extend, candidates, folder, config.vocab_size)
        if config.model:
            speak(f"Resizing {config.model}")
            rows = resize_model(config.model, Tokenizer.load(config.extend), Tokenizer.load(folder), folder)
    print(f"new pieces       {len(extension.pieces):,} from id {extension.first_id}; every one is emitted for its text")
    print(f"left out         {extension.unreachable:,} that the base would never emit")
    if rows is not None:
        print(f"model rows       {rows:,}")


def _print_vocabulary(config: TrainTokenizer, tokenizer: Tokenizer, sample: Sample) -> None:
    print(f"vocabulary       {tokenizer.vocab_size:,} ids, {tokenizer.padded_vocab_size:,} model rows, in {config.out}")
    print(
        f"learnt from      {sample.used_characters:,} of {sample.characters:,} characters in {sample.texts:,} documents"
    )
    if sample.long_lines:
        print(f"long lines       {sample.long_lines:,} were read in parts; nothing of them is left out")


def _print_compression(tokenizer: Tokenizer, base: str | None, lines: list[str]) -> None:
    after = measure(tokenizer, lines)
    before = f", {measure(Tokenizer.load(base), lines).characters_per_token:.3f} before" if base else ""
    print(
        f"compression      {after.characters_per_token:.3f} characters per token{before}, "
        f"on {after.characters:,} held-out characters"
    )


def _print_round_trip(report: TokenizerReport) -> None:
    print(f"read back        {report.documents:,} documents, {report.changed_documents:,} of them changed")
    if report.lossy_documents:
        print(f"lossy documents  {report.lossy_documents:,} hold a literal U+2581, which comes back as a space")


def _at_most(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


if __name__ == "__main__":
    run(main, TrainTokenizer, aliases={"data": "data.paths"})
