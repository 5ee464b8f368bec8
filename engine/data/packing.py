"""Documents to packs of a fixed number of tokens, each piece of a document in a segment of its own.

Packs are formed window by window: millions of tokens of documents in the mixture's order, cut at the context length
into pieces and shuffled, so that the chapters of a book do not follow one another and a step sees many books. Best-fit
decreasing (Johnson 1974) puts the pieces into packs; what fits nowhere whole is split
over the gaps, and the last gaps are filled with the documents that come next, so that padding stays below 1/256 and
few documents are split for it. A window ends with its epoch; the next one begins where the last one took its last
token, so its whole state is (epoch, slot, offset): three integers, whatever the corpus.

A piece that ends inside its document keeps the next token as its last target: splitting costs context, no target.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.data.mixture import Mixture
from engine.data.permutation import Permutation

# A window ends after so many tokens, or pieces where they are short; packing that many takes a second.
WINDOW_TOKENS = 1 << 26
WINDOW_PIECES = 1 << 16
# A gap below 1/256 of a pack is left to padding; splitting a document for it would cost more than it gives.
_TOLERANCE = 256
_SLOTS_AT_ONCE = 4096


class Piece(NamedTuple):
    """Tokens [start, start + length) of a document, met in an epoch."""

    epoch: int
    document: int
    start: int
    length: int


class Position(NamedTuple):
    """A place in the endless sequence of documents: `offset` tokens of that slot's document are behind it."""

    epoch: int = 0
    slot: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Window:
    """Packs in the order in which they are trained on, and where the next window begins."""

    packs: list[list[Piece]]
    end: Position


def max_documents(tokens_per_pack: int) -> int:
    """Most pieces of a pack: a pack of documents of eight tokens each is still full."""
    return max(16, tokens_per_pack // 8)


class Packer:
    """Forms windows of packs.

    Args:
        tokens_per_pack: T.
        context: longest piece, at most T.
        allow_split: whether a piece may be cut to fill a gap. Without it gaps stay, and no window takes
            documents of the next epoch.
    """

    def __init__(
        self, mixture: Mixture, seed: int, tokens_per_pack: int, context: int, allow_split: bool = True
    ) -> None:
        assert 2 <= context <= tokens_per_pack
        self._mixture = mixture
        self._seed = seed
        self._tokens_per_pack = tokens_per_pack
        self._context = context
        self._allow_split = allow_split

    def window(self, begin: Position, tokens: int | None = None) -> Window:
        """The window that begins at a position.

        Args:
            tokens: take documents of so many tokens; by default a window's worth.
        """
        stream = _Stream(self._mixture, begin, self._context)
        pieces = stream.take(tokens) if tokens else stream.take(WINDOW_TOKENS, WINDOW_PIECES)
        mixed = Permutation(len(pieces), self._seed, "pieces", *begin)(np.arange(len(pieces)))
        pieces = [pieces[index] for index in mixed]
        bins = _Bins(self._tokens_per_pack)
        if self._allow_split:
            most = -(-sum(piece.length for piece in pieces) // self._tokens_per_pack)
            bins.split(bins.place(pieces, most))
            bins.fill(stream)
        else:
            bins.place(pieces, len(pieces))
        order = Permutation(len(bins.packs), self._seed, "packs", *begin)(np.arange(len(bins.packs)))
        return Window([bins.packs[index] for index in order], stream.position)


def count_packs(mixture: Mixture, seed: int, tokens_per_pack: int, context: int, epoch: int = 0) -> int:
    """Packs of one epoch where no document is cut (`allow_split` is False): millions of documents a second.

    The number depends on which documents share a window, and beyond that on how many of each length there are. Exact
    for the epoch that is asked for; that of another epoch differs by the unfilled ends of windows, a few packs in ten
    thousand.
    """
    packs, slot = 0, 0
    while slot < (end := mixture.epoch_length(epoch)):
        lengths = mixture.corpus.store.lengths(mixture.documents(epoch, slot, min(end, slot + WINDOW_PIECES)))
        assert lengths.max() <= context
        taken = 1 + int(np.searchsorted(np.cumsum(lengths), WINDOW_TOKENS))
        lengths = lengths[:taken]
        if tokens_per_pack <= max_documents(tokens_per_pack) * lengths.min():
            packs += _count_bins(lengths, tokens_per_pack)
        else:  # so many short ones that a pack may be full before its tokens are
            packer = Packer(mixture, seed, tokens_per_pack, context, allow_split=False)
            packs += len(packer.window(Position(epoch, slot)).packs)
        slot += len(lengths)
    return packs


def _count_bins(lengths: np.ndarray, capacity: int) -> int:
    """Bins that best-fit decreasing needs: all pieces of a length at once.

    The tightest gap that takes a piece is the tightest for the next one of that length too, as long as it takes it. So
    bins with a gap g take g // length of them each, before any wider one does.
    """
    bins = 0
    gaps: list[int] = []  # that bins have, ascending
    counts: dict[int, int] = {}

    def add(gap: int, number: int) -> None:
        if number and gap:
            if gap not in counts:
                bisect.insort(gaps, gap)
            counts[gap] = counts.get(gap, 0) + number

    sizes, numbers = np.unique(lengths, return_counts=True)
    for size, left in zip(sizes[::-1].tolist(), numbers[::-1].tolist(), strict=True):
        while left:
            index = bisect.bisect_left(gaps, size)
            if index == len(gaps):
                needed = -(-left // (capacity // size))
                bins += needed
                add(capacity, needed)
                continue
            gap = gaps.pop(index)
            number = counts.pop(gap)
            each = gap // size
            filled = min(number, left // each)
            rest = min(left - filled * each, each) if filled < number else 0
            left -= filled * each + rest
            add(gap - each * size, filled)
            add(gap - rest * size, int(rest > 0))
            add(gap, number - filled - (rest > 0))
    return bins


class _Bins:
    """Packs being filled. `_open` holds (gap, pack), ascending: the tightest fit is found by bisection."""

    def __init__(self, capacity: int) -> None:
        self.packs: list[list[Piece]] = []
        self._capacity = capacity
        self._tolerance = capacity // _TOLERANCE
        self._most_pieces = max_documents(capacity)
        self._open: list[tuple[int, int]] = []

    def place(self, pieces: list[Piece], most_packs: int) -> list[Piece]:
        """Best-fit decreasing into at most so many packs. Returns the pieces that fit nowhere."""
        leftover = []
        for piece in sorted(pieces, key=lambda piece: -piece.length):
            if not self._place_whole(piece):
                if len(self.packs) < most_packs:
                    self._new(piece)
                else:
                    leftover.append(piece)
        return leftover

    def split(self, pieces: list[Piece]) -> None:
        """Spread pieces over the largest gaps, and over new packs when there are none."""
        for piece in pieces:
            rest = piece
            while not self._place_whole(rest):
                gap = self._open[-1][0] if self._open else 0
                if gap <= self._tolerance:
                    self._new(rest)
                    break
                self._put(len(self._open) - 1, rest._replace(length=gap))
                rest = rest._replace(start=rest.start + gap, length=rest.length - gap)

    def fill(self, stream: _Stream) -> None:
        """Fill every gap that is too large for padding with what comes next."""
        while self._open and self._open[-1][0] > self._tolerance:
            self._put(len(self._open) - 1, stream.next(self._open[-1][0]))

    def _place_whole(self, piece: Piece) -> bool:
        index = bisect.bisect_left(self._open, (piece.length, 0))
        if index == len(self._open):
            return False
        self._put(index, piece)
        return True

    def _put(self, index: int, piece: Piece) -> None:
        gap, pack = self._open.pop(index)
        self.packs[pack].append(piece)
        self._keep_open(pack, gap - piece.length)

    def _new(self, piece: Piece) -> None:
        self.packs.append([piece])
        self._keep_open(len(self.packs) - 1, self._capacity - piece.length)

    def _keep_open(self, pack: int, gap: int) -> None:
        if gap and len(self.packs[pack]) < self._most_pieces:
            bisect.insort(self._open, (gap, pack))


class _Stream:
    """Pieces in the mixture's order from a position on."""

    def __init__(self, mixture: Mixture, begin: Position, context: int) -> None:
        self._mixture = mixture
        self._context = context
        self.position = begin
        self._enter_epoch()
        self._ahead: list[tuple[int, int]] = []
        self._ahead_begin = (-1, 0)

    def take(self, tokens: int, most_pieces: int | None = None) -> list[Piece]:
        """Pieces of at least so many tokens, or up to the epoch's end, or so many pieces."""
        epoch, taken = self.position.epoch, 0
        pieces: list[Piece] = []
        while taken < tokens and self.position.epoch == epoch and len(pieces) != most_pieces:
            piece = self.next(self._context)
            pieces.append(piece)
            taken += piece.length
        return pieces

    def next(self, most: int) -> Piece:
        """The next piece, of at most so many tokens and no longer than the context."""
        epoch, slot, offset = self.position
        document, length = self._look_up(epoch, slot)
        taken = min(length - offset, most, self._context)
        if offset + taken < length:
            self.position = Position(epoch, slot, offset + taken)
        else:
            self.position = Position(epoch, slot + 1)
            self._enter_epoch()
        return Piece(epoch, document, offset, taken)

    def _enter_epoch(self) -> None:
        """Go on to the next epoch at the end of one. A small weight may leave an epoch without documents."""
        while self.position.slot >= self._mixture.epoch_length(self.position.epoch):
            self.position = Position(self.position.epoch + 1)

    def _look_up(self, epoch: int, slot: int) -> tuple[int, int]:
        """Number and length of the document in a slot; slots are asked for in order, and looked up many at a time."""
        begin = self._ahead_begin[1]
        if epoch != self._ahead_begin[0] or slot >= begin + len(self._ahead):
            last = min(slot + _SLOTS_AT_ONCE, self._mixture.epoch_length(epoch))
            documents = self._mixture.documents(epoch, slot, last)
            lengths = self._mixture.corpus.store.lengths(documents)
            self._ahead = list(zip(documents.tolist(), lengths.tolist(), strict=True))
            self._ahead_begin, begin = (epoch, slot), slot
        return self._ahead[slot - begin]
