"""Packs to batches: every rank forms the same packs and reads the tokens of its own.

A step is a fixed number of packs of the global sequence, dealt to the ranks in turn. What a rank lacks to the same
number of micro-batches as the others is a batch without targets. So neither the number of ranks nor a restart
changes which documents a step holds.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from engine.data.corpus import Corpus
from engine.data.mixture import Mixture
from engine.data.packing import Packer, Piece, Position, Window, count_packs, max_documents
from engine.data.report import count_too_long
from engine.data.shards import TRAINED
from model.batch import IGNORE, PackedBatch
from model.errors import InputError

_STEPS_AHEAD = 2


@dataclass(frozen=True)
class Cursor:
    """Everything that says what the next step holds, and what the steps before it held.

    corpus, seed: what the position means something for.
    epoch, slot, offset: where the present window begins.
    pack: packs of that window that are behind us.
    packs, tokens, cuts: behind us altogether; tokens without padding; cuts are pieces that begin inside a document.
    """

    corpus: str
    seed: int
    epoch: int = 0
    slot: int = 0
    offset: int = 0
    pack: int = 0
    packs: int = 0
    tokens: int = 0
    cuts: int = 0

    @property
    def window(self) -> Position:
        return Position(self.epoch, self.slot, self.offset)


M = TypeVar("M")  # what a micro-batch is


class StepLoader(ABC, Generic[M]):
    """This rank's micro-batches, step by step, without end; what is made of a pack is a subclass's business.

    Args:
        seed: of the order of documents.
        tokens_per_pack: T, tokens of a micro-batch.
        context: longest piece of a document.
        packs_per_step: B, over all ranks.
        cursor: a former loader's `cursor`, to go on behind it.
        allow_split: whether documents may be cut where the context does not demand it, to leave no padding.
            Conversations may not.
    Attributes:
        cursor: JSON state after the last step that was handed out.
        wait_seconds: how long the last `next_step` waited for its data.
    Raises:
        InputError: a cursor of another corpus or seed, or fewer tokens in an epoch than a step holds.
    """

    def __init__(
        self,
        corpus: Corpus,
        seed: int,
        tokens_per_pack: int,
        context: int,
        packs_per_step: int,
        rank: int = 0,
        world: int = 1,
        cursor: dict[str, Any] | None = None,
        allow_split: bool = True,
    ) -> None:
        assert corpus.kind == "texts" or not allow_split, f"{corpus.kind} are trained on whole"
        require_a_step(corpus, packs_per_step * tokens_per_pack)
        start = _restore(cursor, corpus, seed)
        self._corpus = corpus
        self._packer = Packer(Mixture(corpus, seed), seed, tokens_per_pack, context, allow_split)
        self._tokens_per_pack = tokens_per_pack
        self._context = context
        self._packs_per_step = packs_per_step
        self._rank = rank
        self._world = world
        self._cursor = start
        self.wait_seconds = 0.0
        self._ready: queue.Queue[tuple[list[M], Cursor] | BaseException] = queue.Queue(_STEPS_AHEAD)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name="data", daemon=True)
        self._thread.start()

    @property
    def cursor(self) -> dict[str, Any]:
        return asdict(self._cursor)

    @property
    def padding_share(self) -> float:
        """Share of all tokens so far that are padding."""
        total = self._cursor.packs * self._tokens_per_pack
        return 1 - self._cursor.tokens / total if total else 0.0

    def describe(self) -> str:
        """What the packs so far were made of, for whoever reads the log."""
        cursor = self._cursor
        packs = f"into {cursor.packs:,} packs with {self.padding_share:.2%} padding"
        if self._corpus.kind != "texts":
            what = "conversations" if self._corpus.kind == "conversations" else "groups of answers"
            return f"Packed {cursor.tokens:,} tokens of whole {what} {packs}."
        return (
            f"Packed {cursor.tokens:,} tokens {packs}; {cursor.cuts:,} pieces began inside a document, at position 0."
        )

    def next_step(self) -> list[M]:
        """Micro-batches of the next step: ceil(B / world), on every rank."""
        assert not self._is_closed.is_set(), "the loader is closed"
        began = time.perf_counter()
        outcome = self._ready.get()
        self.wait_seconds = time.perf_counter() - began
        if isinstance(outcome, BaseException):
            self._ready.put(outcome)
            raise outcome
        batches, self._cursor = outcome
        return batches

    def close(self) -> None:
        """Stop reading ahead."""
        self._is_closed.set()
        while self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _work(self, cursor: Cursor) -> None:
        """Read ahead, in a thread of its own."""
        try:
            window: Window | None = None
            while not self._is_closed.is_set():
                first = cursor.packs
                packs: list[list[Piece]] = []
                while len(packs) < self._packs_per_step:
                    window = window or self._packer.window(cursor.window)
                    packs.append(window.packs[cursor.pack])
                    cursor = _behind(cursor, packs[-1])
                    if cursor.pack == len(window.packs):
                        cursor = replace(cursor, **window.end._asdict(), pack=0)
                        window = None
                self._ready.put((self._batches(packs, first), cursor))
        except BaseException as error:
            self._ready.put(error)

    def _batches(self, packs: list[list[Piece]], first: int) -> list[M]:
        count = -(-self._packs_per_step // self._world)
        return [self._batch(*pack) for pack in _share(packs, first, count, self._rank, self._world)]

    @abstractmethod
    def _batch(self, pack: list[Piece], index: int) -> M:
        """The micro-batch of a pack, `index` its number among all of the run."""


class PackLoader(StepLoader[PackedBatch]):
    """Documents, next tokens as targets."""

    def _batch(self, pack: list[Piece], index: int) -> PackedBatch:
        return build_batch(self._corpus, pack, self._tokens_per_pack, self._context, index)


def require_a_step(corpus: Corpus, tokens: int) -> None:
    """Check that there is enough to train on.

    Raises:
        InputError: fewer tokens in an epoch than a step holds.
    """
    if corpus.epoch_tokens < tokens:
        what = f"An epoch of the data has {corpus.epoch_tokens:,} tokens, a step takes {tokens:,}"
        manifests = [(prepared.directory, prepared.manifest) for prepared in corpus.store.prepared]
        if corpus.kind != "texts" and (
            lost := sum(count_too_long(path / "rejects.jsonl", manifest["context"]) for path, manifest in manifests)
        ):
            read = sum(manifest["documents"] + manifest["rejected"] for _, manifest in manifests)
            raise InputError(
                f"{what}: {lost:,} of {read:,} records are left out, longer than the context of "
                f"{manifests[0][1]['context']:,} tokens. Raise --train.context, on a --model of a longer one if "
                "need be, give more data, or lower --train.batch_tokens."
            )
        raise InputError(f"{what}. Give more data, or lower --train.batch_tokens.")


def packs_per_epoch(corpus: Corpus, seed: int, tokens_per_pack: int, context: int) -> int:
    """Packs that a loader makes of the first epoch of conversations; two million take two seconds.

    Exact for that epoch. Another one's number may differ a little where documents are packed in several windows.
    """
    return count_packs(Mixture(corpus, seed), seed, tokens_per_pack, context)


def evaluation_batches(
    corpus: Corpus,
    tokens_per_pack: int,
    context: int,
    rank: int = 0,
    world: int = 1,
    max_tokens: int | None = None,
) -> Iterator[PackedBatch]:
    """Every document of a corpus once, in batches; the same number of them on every rank.

    Args:
        max_tokens: no more than so many tokens (and the rest of a piece), of documents chosen once and for all.
    """
    for pack, index in evaluation_packs(corpus, tokens_per_pack, context, rank, world, max_tokens):
        yield build_batch(corpus, pack, tokens_per_pack, context, index)


def evaluation_packs(
    corpus: Corpus, tokens_per_pack: int, context: int, rank: int, world: int, max_tokens: int | None
) -> Iterator[tuple[list[Piece], int]]:
    """A rank's packs of `evaluation_batches`, each with its number."""
    packer = Packer(Mixture(corpus, 0), 0, tokens_per_pack, context, allow_split=False)
    packs = packer.window(Position(), tokens=min(max_tokens or corpus.num_tokens, corpus.num_tokens)).packs
    for first in range(0, len(packs), world):
        yield from _share(packs[first : first + world], first, 1, rank, world)


def _restore(cursor: dict[str, Any] | None, corpus: Corpus, seed: int) -> Cursor:
    if cursor is None:
        return Cursor(corpus.fingerprint, seed)
    restored = Cursor(**cursor)
    if restored.corpus != corpus.fingerprint:
        raise InputError(
            "The checkpoint was made on other data (or other weights or held-out documents). Give the same --data, "
            "or begin anew with --resume never."
        )
    if restored.seed != seed:
        raise InputError(f"The checkpoint was made with --seed {restored.seed}, not {seed}. Give the same seed.")
    return restored


def _behind(cursor: Cursor, pack: list[Piece]) -> Cursor:
    """The cursor after one more pack."""
    return replace(
        cursor,
        pack=cursor.pack + 1,
        packs=cursor.packs + 1,
        tokens=cursor.tokens + sum(piece.length for piece in pack),
        cuts=cursor.cuts + sum(piece.start > 0 for piece in pack),
    )


def _share(
    packs: list[list[Piece]], first: int, count: int, rank: int, world: int
) -> Iterator[tuple[list[Piece], int]]:
    """`count` packs with their numbers: every `world`-th from `rank` on, then empty ones.

    Args:
        first: number of packs[0] among all packs of the run.
    """
    mine = [(packs[place], first + place) for place in range(rank, len(packs), world)]
    yield from mine
    yield from [([], -1)] * (count - len(mine))


def build_batch(corpus: Corpus, pack: list[Piece], tokens_per_pack: int, context: int, index: int = 0) -> PackedBatch:
    """The tokens of a pack, pinned where there is a GPU to copy them to.

    Each piece is a segment. The padding behind them is cut into segments no longer than the context, and has no
    targets; neither has the first token of a document, nor what follows its last one. In conversations only the tokens
    that are trained are targets.
    """
    tokens = np.zeros(tokens_per_pack, np.int64)
    targets = np.full(tokens_per_pack, IGNORE, np.int64)
    begin = 0
    for piece in pack:
        # One token more than the piece, where its document goes on: the last target.
        ids = corpus.read(piece.document, piece.start, piece.start + piece.length + 1)
        following = ids[1:]
        if corpus.kind == "conversations":
            assert piece.start == 0, "a conversation is trained on whole"
            is_trained, ids = ids >= TRAINED, (ids % TRAINED).astype(np.int64)
            following = np.where(is_trained[1:], ids[1:], IGNORE)
        tokens[begin : begin + piece.length] = ids[: piece.length]
        targets[begin : begin + len(following)] = following
        begin += piece.length
    lengths = [piece.length for piece in pack]
    return packed_batch(tokens, targets, lengths, max_documents(tokens_per_pack), context, index)


def packed_batch(
    tokens: np.ndarray, targets: np.ndarray, lengths: list[int], most_documents: int, context: int, index: int
) -> PackedBatch:
    """Documents of these lengths as a batch; what is behind them becomes segments no longer than the context.

    Args:
        tokens, targets: int64 [T].
    """
    size = len(tokens)
    bounds = [0, *itertools.accumulate(lengths)]
    assert bounds[-1] <= size and len(lengths) <= most_documents
    while bounds[-1] < size:
        bounds.append(min(bounds[-1] + context, size))
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    cu_seqlens = np.full(most_documents + -(-size // context) + 1, size, np.int32)
    cu_seqlens[: len(bounds)] = bounds
    return PackedBatch(
        tokens=pinned(tokens),
        positions=pinned(np.arange(size) - starts),
        cu_seqlens=pinned(cu_seqlens),
        targets=pinned(targets),
        num_documents=len(lengths),
        max_seqlen=context,
        index=index,
    )


def pinned(values: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
