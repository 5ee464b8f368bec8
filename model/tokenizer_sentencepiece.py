"""SentencePiece BPE models (`tokenizer.model`): read them, and say the same thing to the tokenizers library.

SentencePiece merges, again and again, the adjacent pair whose union is the piece of highest score. The tokenizers
library merges the pair of lowest rank in a list. The list that says the same holds every way of cutting every
piece into two pieces, ordered by the score of the union. What is left are ties. Overlapping cuts of one piece
(runs such as "----"): SentencePiece takes the leftmost, the list the one with the shorter left half, as in
transformers. Different pieces of one score (a vocabulary to which pieces were appended at score 0): no list says
"leftmost first", so ids decide, again as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from model.errors import InputError

SPACE = "\u2581"  # stands for a space inside pieces; the reason why a literal U+2581 decodes to a space

_BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type


def read_sentencepiece(content: bytes, path: Path) -> Any:
    """Parse a SentencePiece ModelProto.

    Args:
        content: the bytes of the file.
        path: where they came from, for messages.
    Raises:
        InputError: not a SentencePiece model, or of a kind no LLaMA-family base uses (unigram, or with a normaliser).
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(content)
    except Exception:  # protobuf's DecodeError moves between its versions
        proto.Clear()
    if not proto.pieces:
        raise InputError(
            f"{path}: not a SentencePiece model. Fetch the file again, or give a directory with tokenizer.json."
        )
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(f"{path}: a SentencePiece model, but not BPE. Give a directory that holds its tokenizer.json.")
    spec = proto.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
        raise InputError(f"{path}: it rewrites text before encoding. Give a directory that holds its tokenizer.json.")
    return proto


def merge_order(proto: Any) -> list[str]:
    """The normal pieces, those that merge first in front."""
    pieces = [piece for piece in proto.pieces if piece.type == NORMAL]
    scores = [piece.score for piece in pieces if len(piece.piece) > 1]
    if len(set(scores)) == len(scores):
        pieces.sort(key=lambda piece: -piece.score)
    return [piece.piece for piece in pieces]


def merge_list(proto: Any) -> list[tuple[str, str]]:
    """Every (left, right) whose union is a piece, in the order in which they merge."""
    order = merge_order(proto)
    known = set(order)
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def to_tokenizers(proto: Any, add_prefix_space: bool) -> Tokenizer:
    """The same tokenizer in the tokenizers library; ids are the positions of the pieces.

    Args:
        proto: from `read_sentencepiece`.
        add_prefix_space: put a space before every text (SentencePiece's dummy prefix) and take it off in decoding.
    """
    unknown = [piece.piece for piece in proto.pieces if piece.type == UNKNOWN]
    backend = Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=merge_list(proto),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    backwards: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix_space:
        steps.insert(0, normalizers.Prepend(SPACE))
        backwards.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(backwards)
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL):
            backend.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == USER_DEFINED:
            backend.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    return backend


class PieceMerger:
    """BPE on one short text under a vocabulary that grows: what `to_tokenizers` does, as a specification.

    rank: piece -> its place in the order of merging. Quadratic in the length of the text, so it is for pieces.
    """

    def __init__(self, order: Iterable[str]) -> None:
        self.rank = {piece: rank for rank, piece in enumerate(order)}

    def __call__(self, text: str, stop_at: int = 1) -> list[str]:
        """Cut `text` (U+2581 for spaces) into pieces, unknown characters staying single.

        Args:
            stop_at: stop merging at this many symbols; 2 shows the halves of a piece.
        """
        symbols = list(text)
        while len(symbols) > stop_at:
            unions = [
                (self.rank[left + right], len(left), at)
                for at, (left, right) in enumerate(pairwise(symbols))
                if left + right in self.rank and left in self.rank and right in self.rank
            ]
            if not unions:
                break
            at = min(unions)[2]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return symbols
