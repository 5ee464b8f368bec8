"""Conversations in packs: whole, apart from one another, each once an epoch, with targets where tokens are trained."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import packing
from engine.data.corpus import Corpus, open_corpus
from engine.data.loader import PackLoader, evaluation_batches, packs_per_epoch
from engine.data.mixture import Mixture
from engine.data.packing import Packer, Position, count_packs
from engine.data.shards import TRAINED
from model.batch import IGNORE, PackedBatch
from model.tokenizer import Tokenizer
from tests.engine.data.dialogues import dialogues, prepare_records
from tests.engine.data.stand_in import prepare_lengths

T, CONTEXT, PACKS = 512, 256, 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return prepare_records(tmp_path_factory.mktemp("dialogues") / "1", dialogues(500), tokenizer, CONTEXT)


@pytest.fixture(scope="module")
def corpus(directory: Path) -> Corpus:
    return open_corpus([directory], kind="conversations")


def loader(corpus: Corpus, rank: int = 0, world: int = 1, cursor: dict | None = None) -> closing[PackLoader]:
    return closing(PackLoader(corpus, 7, T, CONTEXT, PACKS, rank, world, cursor, allow_split=False))


def segments(batch: PackedBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets of each conversation of a batch."""
    bounds = batch.cu_seqlens[: batch.num_documents + 1].tolist()
    return [(batch.tokens[a:b].numpy(), batch.targets[a:b].numpy()) for a, b in itertools.pairwise(bounds)]


def test_targets_are_exactly_the_trained_tokens_that_follow(corpus: Corpus) -> None:
    stored = {(ids % TRAINED).tobytes(): ids for ids in map(corpus.read, corpus.documents().tolist())}
    with loader(corpus) as one:
        for batch in itertools.chain.from_iterable(one.next_step() for _ in range(4)):
            for tokens, targets in segments(batch):
                ids = stored[tokens.astype(np.uint32).tobytes()]
                following = [int(token) for token in ids[1:]]
                expected = [token - TRAINED if token >= TRAINED else IGNORE for token in following]
                assert targets.tolist() == [*expected, IGNORE]
            bounds = batch.cu_seqlens.numpy()
            assert (batch.targets[bounds[batch.num_documents] :] == IGNORE).all()
            positions = np.concatenate([np.arange(length) for length in np.diff(bounds)])
            assert np.array_equal(batch.positions.numpy(), positions)


def test_a_conversation_is_seen_exactly_once_an_epoch_and_epochs_differ(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW_PIECES", 90)  # several windows an epoch, the last of them smaller
    ends = np.cumsum([0, *(count_packs(Mixture(corpus, 7), 7, T, CONTEXT, epoch) for epoch in range(3))]).tolist()
    with loader(corpus) as one:
        batches = [batch for _ in range(ends[-1] // PACKS + 1) for batch in one.next_step()]
    stored = Counter((corpus.read(document) % TRAINED).astype(np.int64).tobytes() for document in corpus.documents())
    orders = []
    for first, last in itertools.pairwise(ends):
        orders.append([tokens.tobytes() for batch in batches[first:last] for tokens, _ in segments(batch)])
        assert Counter(orders[-1]) == stored
    assert orders[0] != orders[1] != orders[2]


def test_any_number_of_ranks_deals_the_same_packs_under_the_same_numbers(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WINDOW_PIECES", 90)

    def dealt(world: int) -> list[PackedBatch]:
        loaders = [PackLoader(corpus, 7, T, CONTEXT, PACKS, rank, world, allow_split=False) for rank in range(world)]
        steps = [[one.next_step() for one in loaders] for _ in range(20)]
        for one in loaders:
            one.close()
        batches = [batch for step in steps for batches in zip(*step, strict=True) for batch in batches]
        assert all((batch.index == -1) == (batch.num_documents == 0) for batch in batches)
        return [batch for batch in batches if batch.num_documents]

    expected = dealt(1)
    assert [batch.index for batch in expected] == list(range(20 * PACKS))
    for world in (2, 3):
        for one, other in zip(expected, dealt(world), strict=True):
            assert one.index == other.index
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)


def test_a_restart_goes_on_with_the_next_pack(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_PIECES", 90)
    with loader(corpus) as one:
        steps = [(one.next_step(), one.cursor) for _ in range(12)]
    with loader(corpus, cursor=steps[6][1]) as other:
        for batches, cursor in steps[7:]:
            again = other.next_step()
            assert [batch.index for batch in again] == [batch.index for batch in batches]
            assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(again, batches, strict=True))
            assert other.cursor == cursor


def test_evaluation_sees_every_conversation_once_on_any_number_of_ranks(corpus: Corpus) -> None:
    for world in (1, 3):
        ranks = [list(evaluation_batches(corpus, T, CONTEXT, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for batches in ranks for batch in batches]
        targets = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        assert targets == sum(int((corpus.read(document)[1:] >= TRAINED).sum()) for document in corpus.documents())
        numbers = sorted(batch.index for batch in batches if batch.num_documents)
        assert numbers == list(range(len(numbers)))


def test_a_source_of_half_weight_is_seen_half_as_often(tmp_path: Path, directory: Path, tokenizer: Tokenizer) -> None:
    other = prepare_records(tmp_path / "2", dialogues(200, seed=5), tokenizer, CONTEXT)
    corpus = open_corpus([directory, other], [1, 0.5], kind="conversations")
    packs = packs_per_epoch(corpus, 0, T, CONTEXT)
    with closing(PackLoader(corpus, 0, T, CONTEXT, 1, allow_split=False)) as one:
        documents = sum(one.next_step()[0].num_documents for _ in range(packs))
    assert documents == 500 + 100


def test_padding_is_reported_in_the_words_of_conversations_and_below_three_percent(corpus: Corpus) -> None:
    with loader(corpus) as one:
        for _ in range(packs_per_epoch(corpus, 7, T, CONTEXT) // PACKS):
            one.next_step()
        assert one.padding_share < 0.03
        assert one.describe().startswith(f"Packed {one.cursor['tokens']:,} tokens of whole conversations into ")


def test_conversations_are_never_split(corpus: Corpus) -> None:
    with pytest.raises(AssertionError, match="whole"):
        PackLoader(corpus, 0, T, CONTEXT, PACKS)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=120),
    st.sampled_from([64, 65, 128, 200]),
    st.integers(1, 50),
    st.integers(0, 3),
)
def test_packs_are_counted_as_they_are_formed(lengths: list[int], capacity: int, window: int, epoch: int) -> None:
    stored = np.array(lengths)
    numbers = SimpleNamespace(
        epoch_length=lambda epoch: len(lengths),
        documents=lambda epoch, first, last: np.random.default_rng(epoch).permutation(len(lengths))[first:last],
        corpus=SimpleNamespace(store=SimpleNamespace(lengths=lambda documents: stored[documents])),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_PIECES", window)
        patch.setattr(packing, "WINDOW_TOKENS", 40 * window)
        packer, position, packs = Packer(numbers, 0, capacity, 64, allow_split=False), Position(epoch), 0  # type: ignore[arg-type]
        while position.epoch == epoch:
            made = packer.window(position)
            packs, position = packs + len(made.packs), made.end
        assert count_packs(numbers, 0, capacity, 64, epoch) == packs  # type: ignore[arg-type]


def test_an_epoch_of_short_texts_is_counted_too(tmp_path: Path) -> None:
    """A pack may be full of pieces before it is full of tokens."""
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [3] * 100)])
    made = Packer(Mixture(corpus, 0), 0, 128, 64, allow_split=False).window(Position()).packs
    assert packs_per_epoch(corpus, 0, 128, 64) == len(made) == 7  # 16 pieces each
