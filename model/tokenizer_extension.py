"""Add domain pieces to the BPE `tokenizer.model` of a LLaMA-family base.

A piece is emitted only where merging arrives at it, so appending words to the table does nothing: their halves
must be pieces too, and must still be there when their turn comes. So a candidate's unknown characters become pieces
first, which may wake old pieces that lacked them. Then its text is encoded: it ends in some symbols s1 .. sn, and the
prefixes s1 s2, s1 s2 s3, .. become pieces. Every one of them is emitted for its own text, because

- new pieces merge after all that were there before, so the text of s1 .. sk first comes to just these symbols;
- from there on the first symbol is always a prefix, and so is its union with the next: all becomes one symbol;
- later additions merge later still, and the characters among them are not in this text, so it never meets them.

Old ids do not move.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from model.errors import InputError
from model.tokenizer import Tokenizer
from model.tokenizer_sentencepiece import (
    CONTROL,
    NORMAL,
    SPACE,
    USER_DEFINED,
    PieceMerger,
    merge_order,
    read_sentencepiece,
)
from model.tokenizer_training import train_sentencepiece


@dataclass(frozen=True)
class Extension:
    """What was added: `pieces` from id `first_id` on; `unreachable` candidates could not be and were left out."""

    first_id: int
    pieces: list[str]
    unreachable: int


def extend_tokenizer(base: str | Path, candidates: Sequence[str], directory: str | Path, vocab_size: int) -> Extension:
    """Write `directory`: the tokenizer of `base` with new pieces behind its last id.

    Args:
        base: a directory with `tokenizer.model`; tokens added on top of it keep their ids.
        candidates: pieces to add, the best first, with U+2581 for spaces; known ones are passed over.
        vocab_size: ids in all, of the base, its added tokens and the new pieces.
    Raises:
        InputError: no SentencePiece BPE base, or a vocab_size that cannot be reached.
    """
    base = Path(base)
    old, proto = open_base(base, vocab_size)
    merger = PieceMerger(merge_order(proto))
    room = vocab_size - old.vocab_size
    # Text that spells a token (`</s>`, `<human>`, `<0x0A>`) is cut there, or would get a second id.
    names = {piece.piece for piece in proto.pieces if piece.type != NORMAL}
    names |= {token.content.replace(" ", SPACE) for token in old.added_tokens.values()}
    holds_name = re.compile("|".join(map(re.escape, names))).search
    plain = [candidate for candidate in candidates if not holds_name(candidate)]
    pieces, unreachable = grow(merger, plain, room, has_prefix=old.add_prefix_space)
    if len(pieces) < room:
        most = old.vocab_size + len(pieces)
        raise InputError(f"a vocabulary of {vocab_size} is more than this text supports: at most {most} on this base.")

    lowest = min((piece.score for piece in proto.pieces if piece.type == NORMAL), default=0.0)
    for index in range(len(proto.pieces), old.vocab_size):
        token = old.added_tokens[index]
        proto.pieces.add(piece=token.content, score=0.0, type=CONTROL if token.special else USER_DEFINED)
    for rank, piece in enumerate(pieces, start=1):
        proto.pieces.add(piece=piece, score=lowest - rank, type=NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    added = {str(index): token.__getstate__() for index, token in old.added_tokens.items()}
    config = {**old.config, "added_tokens_decoder": added}
    new = Tokenizer.from_sentencepiece(proto.SerializeToString(), config, old.files, base)
    assert new.vocab_size == vocab_size
    new.save(directory)
    return Extension(old.vocab_size, pieces, unreachable + len(candidates) - len(plain))


def grow(merger: PieceMerger, candidates: Sequence[str], room: int, has_prefix: bool) -> tuple[list[str], int]:
    """Append to `merger` the candidates, and what leads to them, that fit into `room` new pieces.

    Args:
        has_prefix: texts are encoded with a space before them. Then a piece is left out whose first characters the
            base joins with that space, and of a word with and without the space only the first to come is taken.
    Returns:
        the new pieces in the order of merging, and the number of candidates left out as unreachable.
    """
    added: dict[str, None] = {}
    unreachable = 0
    for candidate in candidates:
        if len(added) == room:
            break
        if candidate in merger.rank:
            continue
        free = room - len(added)  # what leads to a candidate is reached without it, so the last may end half-way
        steps = _append(merger, dict.fromkeys(candidate), free)
        # Only now: with its characters known, the candidate may hold old pieces that could not be merged before.
        steps += _append(merger, accumulate(merger(candidate)), free - len(steps))
        if has_prefix and not all(_is_emitted_after_prefix(merger, piece, added) for piece in steps):
            for piece in steps:
                del merger.rank[piece]
            unreachable += 1
            continue
        added.update(dict.fromkeys(steps))
    return list(added), unreachable


def _append(merger: PieceMerger, pieces: Iterable[str], most: int) -> list[str]:
    """Make the first `most` of the `pieces` that are unknown merge last; returns them."""
    new = [piece for piece in pieces if piece not in merger.rank][:most]
    for piece in new:
        merger.rank[piece] = len(merger.rank)
    return new


def _is_emitted_after_prefix(merger: PieceMerger, piece: str, added: dict[str, None]) -> bool:
    if piece == SPACE:  # unknown until now: it may wake old pieces in front of everything added
        return not added
    if piece.startswith(SPACE):
        return piece[1:] not in added
    return merger(SPACE + piece)[-1] == piece


def domain_pieces(
    base: str | Path, lines: Sequence[str], vocab_size: int, character_coverage: float = 0.9999
) -> list[str]:
    """Candidates for `extend_tokenizer`: what a tokenizer trained on `lines` has and `base` lacks, the best first.

    Args:
        lines: text of the domain, from `sample_lines`.
        vocab_size: of the extended tokenizer; about so many pieces are learnt beside the characters of the text.
    """
    _, proto = open_base(base, vocab_size)
    characters: set[str] = set().union(*lines)
    model = train_sentencepiece(lines, vocab_size + len(characters) + 260, character_coverage, is_limit_soft=True)
    return rank_candidates(model, lines, PieceMerger(merge_order(proto)))


def rank_candidates(domain_model: bytes, lines: Sequence[str], known: PieceMerger) -> list[str]:
    """Pieces of a domain's own tokenizer that a base lacks, by the tokens that each would save on `lines`.

    A merge saves one token each time it is made; a character that the base spells in bytes saves all but one.

    Args:
        domain_model: a SentencePiece BPE model trained on the domain.
        lines: text of the domain.
        known: the base's pieces.
    """
    proto = read_sentencepiece(domain_model, Path("domain tokenizer"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=domain_model)
    counts = np.zeros(len(proto.pieces), dtype=np.int64)
    for start in range(0, len(lines), 10_000):
        for ids in processor.encode(list(lines[start : start + 10_000]), num_threads=1):
            counts += np.bincount(ids, minlength=len(counts))
    uses = {piece.piece: int(count) for piece, count in zip(proto.pieces, counts, strict=True) if piece.type == NORMAL}
    merger = PieceMerger(merge_order(proto))
    # From the last merge to the first: every use of a piece was a use of its two halves.
    for piece in sorted(uses, key=merger.rank.__getitem__, reverse=True):
        if len(piece) > 1:
            for half in merger(piece, stop_at=2):
                uses[half] += uses[piece]
    savings = {
        piece: count * (1 if len(piece) > 1 else len(piece.encode()) - 1)
        for piece, count in uses.items()
        if piece not in known.rank
    }
    return [piece for piece, saved in sorted(savings.items(), key=lambda entry: -entry[1]) if saved > 1]


def extended_rows(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """For every id that `new` has beyond `old`, the old ids that its text was made of.

    Raises:
        InputError: `new` does not contain `old` id for id.
    """
    for index in range(old.vocab_size):
        if old.piece(index) != new.piece(index):
            raise InputError(
                f"the new tokenizer's id {index} is {new.piece(index)!r}, the old one's {old.piece(index)!r}. "
                "Give a tokenizer that extends the model's own."
            )
    return {index: old.split(new.piece(index)) for index in range(old.vocab_size, new.vocab_size)}


def open_base(base: str | Path, vocab_size: int) -> tuple[Tokenizer, Any]:
    """The base's tokenizer and its SentencePiece model, once it is clear that they can grow to `vocab_size` ids.

    Raises:
        InputError: no tokenizer.model, or one that does not define the base's ids, or no room for a new piece.
    """
    path = Path(base) / "tokenizer.model"
    tokenizer = Tokenizer.load(base)
    if not path.is_file():
        raise InputError(f"{base}: no tokenizer.model in it. Only SentencePiece bases can be extended.")
    proto = read_sentencepiece(path.read_bytes(), path)
    for index, piece in enumerate(proto.pieces):
        if tokenizer.piece(index) != piece.piece:
            raise InputError(
                f"{base}: id {index} is {piece.piece!r} in tokenizer.model and {tokenizer.piece(index)!r} in "
                "tokenizer.json. Fetch files that belong together."
            )
    if vocab_size <= tokenizer.vocab_size:
        raise InputError(f"{base}: it has {tokenizer.vocab_size} ids already. Ask for a larger --vocab_size.")
    return tokenizer, proto
