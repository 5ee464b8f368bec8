"""Groups of answers to batches: packed whole, in an order that neither the number of ranks nor a restart changes.

A step is a fixed number of packs, as everywhere (`loader.py`): the number of groups in it varies a little with their
lengths, the memory and the time of a step do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.data.groups import PreferenceSet
from engine.data.loader import StepLoader, evaluation_packs, packed_batch, packs_per_epoch, pinned
from engine.data.packing import Piece
from engine.data.ranked_batch import RankedBatch as RankedBatch
from model.batch import IGNORE
from model.errors import InputError


class RankedLoader(StepLoader[RankedBatch]):
    """This rank's micro-batches of groups, step by step, without end.

    Args:
        seed: of the order of groups.
        tokens_per_pack: T, tokens of a micro-batch.
        context: the longest sequence.
        packs_per_step: B, over all ranks.
        cursor: a former loader's `cursor`, to go on behind it.
    Raises:
        InputError: a group that fits no micro-batch, a cursor of another set or seed, or fewer tokens in an epoch than
            a step holds.
    """

    def __init__(
        self,
        groups: PreferenceSet,
        seed: int,
        tokens_per_pack: int,
        context: int,
        packs_per_step: int,
        rank: int = 0,
        world: int = 1,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        require_room(groups, tokens_per_pack)
        self._groups, self._longest = groups, context
        # A group is a piece as long as it is.
        super().__init__(
            groups, seed, tokens_per_pack, tokens_per_pack, packs_per_step, rank, world, cursor, allow_split=False
        )

    def _batch(self, pack: list[Piece], index: int) -> RankedBatch:
        return build_ranked_batch(self._groups, _numbers(pack), self._tokens_per_pack, self._longest, index)


def require_room(groups: PreferenceSet, tokens_per_pack: int) -> None:
    """Check that every group fits into a micro-batch.

    Raises:
        InputError: one does not.
    """
    if groups.most_tokens > tokens_per_pack:
        raise InputError(
            f"The answers to one prompt take up to {groups.most_tokens:,} tokens together, a micro-batch holds "
            f"{tokens_per_pack:,}. Raise --train.micro_batch_tokens to {groups.most_tokens}, or lower "
            "--data.max_responses or --train.context."
        )


def ranked_packs_per_epoch(groups: PreferenceSet, seed: int, tokens_per_pack: int) -> int:
    """Packs that a loader makes of the first epoch; see `packs_per_epoch`."""
    return packs_per_epoch(groups, seed, tokens_per_pack, tokens_per_pack)


def evaluation_ranked_batches(
    groups: PreferenceSet,
    tokens_per_pack: int,
    context: int,
    rank: int = 0,
    world: int = 1,
    max_tokens: int | None = None,
) -> Iterator[RankedBatch]:
    """Every group once, in batches; the same number of them on every rank.

    Args:
        max_tokens: no more than so many tokens (and the rest of a group), of groups chosen once and for all.
    """
    require_room(groups, tokens_per_pack)
    for pack, index in evaluation_packs(groups, tokens_per_pack, tokens_per_pack, rank, world, max_tokens):
        yield build_ranked_batch(groups, _numbers(pack), tokens_per_pack, context, index)


def build_ranked_batch(
    groups: PreferenceSet, numbers: list[int], tokens_per_pack: int, context: int, index: int = 0
) -> RankedBatch:
    """Groups, by their numbers, as a batch; pinned where there is a GPU to copy it to."""
    most = tokens_per_pack // groups.shortest
    tokens = np.zeros(tokens_per_pack, np.int64)
    targets = np.full(tokens_per_pack, IGNORE, np.int64)
    owners, sequence = np.full(most, -1, np.int64), np.full(most, -1, np.int64)
    ends, grades = np.zeros(most, np.int64), np.zeros(most, np.float32)
    lengths: list[int] = []
    begin = 0
    for owner, number in enumerate(numbers):
        group = groups.group(number)
        for place, (ids, start, grade) in enumerate(zip(group.ids, group.answer_starts, group.grades, strict=True)):
            end, slot = begin + len(ids), len(lengths)
            tokens[begin:end] = ids
            targets[begin + start - 1 : end - 1] = ids[start:]
            ends[slot], owners[slot], grades[slot] = end - 1, owner, grade
            sequence[slot] = group.first_sequence + place
            lengths.append(len(ids))
            begin = end
    return RankedBatch(
        batch=packed_batch(tokens, targets, lengths, most, context, index),
        ends=pinned(ends),
        groups=pinned(owners),
        grades=pinned(grades),
        sequence=pinned(sequence),
        most_responses=groups.most_responses,
    )


def _numbers(pack: list[Piece]) -> list[int]:
    return [piece.document for piece in pack]
