"""Groups to batches: whole, once an epoch, the same for any number of ranks, from any cursor on."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pytest
import torch

from engine.data.groups import PreferenceSet
from engine.data.ranked_batch import RankedBatch
from engine.data.ranked_loader import (
    RankedLoader,
    build_ranked_batch,
    evaluation_ranked_batches,
    ranked_packs_per_epoch,
)
from model.batch import IGNORE
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.engine.data.comparisons import comparisons, open_records

T, CONTEXT, PACKS = 512, 128, 3


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> PreferenceSet:
    found = open_records(tmp_path_factory.mktemp("groups") / "1", comparisons(150), tokenizer, CONTEXT)
    assert found.num_groups == 150 and found.most_tokens <= T
    return found


def loader(groups: PreferenceSet, rank: int = 0, world: int = 1, cursor: dict[str, Any] | None = None) -> Any:
    return closing(RankedLoader(groups, 7, T, CONTEXT, PACKS, rank, world, cursor))


def tensors(batch: RankedBatch) -> list[torch.Tensor]:
    packed = batch.batch
    own = [batch.ends, batch.groups, batch.grades, batch.sequence]
    return [*own, packed.tokens, packed.targets, packed.positions, packed.cu_seqlens]


def same(one: RankedBatch, other: RankedBatch) -> bool:
    return all(torch.equal(*pair) for pair in zip(tensors(one), tensors(other), strict=True))


def steps(
    groups: PreferenceSet, count: int, world: int = 1, cursor: dict[str, Any] | None = None
) -> list[list[RankedBatch]]:
    """The packs of each step, dealt back from all ranks."""
    ranks = []
    for rank in range(world):
        with loader(groups, rank, world, cursor) as one:
            ranks.append([one.next_step() for _ in range(count)])
    dealt = []
    for step in range(count):
        by_index = {batch.batch.index: batch for rank in ranks for batch in rank[step] if batch.batch.index >= 0}
        dealt.append([by_index[index] for index in sorted(by_index)])
    return dealt


def sequences(batches: list[RankedBatch]) -> list[int]:
    return [number for batch in batches for number in batch.sequence[batch.is_sequence].tolist()]


def test_batch_holds_what_its_groups_hold(groups: PreferenceSet) -> None:
    numbers = [5, 0, 77]
    batch = build_ranked_batch(groups, numbers, 2 * T, CONTEXT, index=4)
    packed = batch.batch
    assert packed.index == 4 and packed.max_seqlen == CONTEXT and batch.most_responses == groups.most_responses
    slot = 0
    for place, number in enumerate(numbers):
        group = groups.group(number)
        for nth, (ids, start, grade) in enumerate(zip(group.ids, group.answer_starts, group.grades, strict=True)):
            begin, end = packed.cu_seqlens[slot : slot + 2].tolist()
            assert packed.tokens[begin:end].tolist() == ids.tolist()
            assert packed.positions[begin:end].tolist() == list(range(len(ids)))
            # Each id of the answer is the target of the place before it; nothing else is a target.
            targets = [IGNORE] * (start - 1) + ids[start:].tolist() + [IGNORE]
            assert packed.targets[begin:end].tolist() == targets
            assert batch.ends[slot] == end - 1
            assert (batch.groups[slot], batch.grades[slot]) == (place, grade)
            assert batch.sequence[slot] == group.first_sequence + nth
            slot += 1
    assert packed.num_documents == slot == int(batch.is_sequence.sum())
    assert (packed.targets[packed.cu_seqlens[slot] :] == IGNORE).all()
    assert (batch.groups[slot:] == -1).all() and (batch.sequence[slot:] == -1).all() and not batch.ends[slot:].any()


def test_each_group_comes_whole_and_once_an_epoch(groups: PreferenceSet) -> None:
    members = {}  # first sequence of a group: all of them
    for number in groups.documents().tolist():
        ids, _, _, first = groups.group(number)
        members[first] = list(range(first, first + len(ids)))
    seen: list[int] = []
    for step in steps(groups, 60):
        for batch in step:
            for group in batch.groups[batch.is_sequence].unique():
                numbers = batch.sequence[batch.groups == group].tolist()
                assert numbers == members[numbers[0]]
            seen += sequences([batch])
    epoch = groups.num_sequences
    assert len(seen) > 2 * epoch
    for begin in range(0, len(seen) - epoch, epoch):
        assert sorted(seen[begin : begin + epoch]) == list(range(epoch))
    assert seen[:epoch] != seen[epoch : 2 * epoch]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_number_of_ranks_sees_the_same_packs(groups: PreferenceSet, world: int) -> None:
    for one, many in zip(steps(groups, 8), steps(groups, 8, world), strict=True):
        assert len(one) == len(many) == PACKS
        assert all(map(same, one, many))


def test_ranks_have_as_many_batches_of_one_shape(groups: PreferenceSet) -> None:
    shapes = set()
    for rank in range(4):
        with loader(groups, rank, 4) as one:
            for _ in range(3):
                batches = one.next_step()
                assert len(batches) == 1
                shapes |= {tuple(tensor.shape for tensor in tensors(batch)) for batch in batches}
    assert len(shapes) == 1
    # The fourth rank has nothing of three packs: no sequence, no target.
    assert not batches[0].is_sequence.any() and (batches[0].batch.targets == IGNORE).all()


def test_going_on_from_any_cursor_is_going_on(groups: PreferenceSet) -> None:
    unbroken = steps(groups, 12)
    with loader(groups) as one:
        for step in range(8):
            cursor = json.loads(json.dumps(one.cursor))
            assert all(map(same, steps(groups, 1, cursor=cursor)[0], unbroken[step]))
            one.next_step()
        assert one.cursor["tokens"] == sum(
            int(batch.batch.cu_seqlens[batch.batch.num_documents]) for step in unbroken[:8] for batch in step
        )


def test_cursor_of_another_set_or_seed_is_refused(groups: PreferenceSet) -> None:
    with loader(groups) as one:
        cursor = one.cursor
    rest, _ = groups.split(0.2)
    with pytest.raises(InputError, match="made on other data"):
        loader(rest, cursor=cursor)
    with pytest.raises(InputError, match="made with --seed 8"):
        loader(groups, cursor={**cursor, "seed": 8})


def test_packs_are_full_and_padding_is_said(groups: PreferenceSet) -> None:
    packs = ranked_packs_per_epoch(groups, 7, T)
    assert 1 - groups.num_tokens / (packs * T) < 0.03
    with loader(groups) as one:
        for _ in range(packs // PACKS):
            one.next_step()
        said = one.describe()
        assert said.startswith(f"Packed {one.cursor['tokens']:,} tokens of whole groups of answers into")
        assert 0 < one.padding_share < 0.05


def test_group_that_fits_no_micro_batch_is_refused_with_the_remedy(groups: PreferenceSet) -> None:
    small = groups.most_tokens - 1
    with pytest.raises(InputError, match=f"Raise --train.micro_batch_tokens to {groups.most_tokens}, or lower"):
        RankedLoader(groups, 7, small, CONTEXT, PACKS)
    with closing(RankedLoader(groups, 7, small + 1, CONTEXT, PACKS)) as one:
        assert len(one.next_step()) == PACKS


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_every_group_once(groups: PreferenceSet, world: int) -> None:
    ranks = [list(evaluation_ranked_batches(groups, T, CONTEXT, rank, world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert sorted(sequences([batch for rank in ranks for batch in rank])) == list(range(groups.num_sequences))


def test_evaluation_may_be_bounded(groups: PreferenceSet) -> None:
    some = [sequences([batch]) for batch in evaluation_ranked_batches(groups, T, CONTEXT, max_tokens=1500)]
    assert some == [sequences([batch]) for batch in evaluation_ranked_batches(groups, T, CONTEXT, max_tokens=1500)]
    tokens = sum(
        int(batch.batch.cu_seqlens[batch.batch.num_documents])
        for batch in evaluation_ranked_batches(groups, T, CONTEXT, max_tokens=1500)
    )
    assert 1500 <= tokens < 1500 + groups.most_tokens


def test_batches_move_as_one(groups: PreferenceSet) -> None:
    batch = build_ranked_batch(groups, [0, 1], T, CONTEXT)
    moved = batch.to("meta")
    assert all(tensor.is_meta for tensor in tensors(moved)) and moved.tokens is moved.batch.tokens
