from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data import packing
from engine.data.corpus import open_corpus
from engine.data.loader import build_batch, evaluation_batches
from engine.data.mixture import Mixture
from engine.data.packing import Packer, Piece, Position, max_documents
from engine.data.prepare import prepare
from engine.data.sources import ReadOptions
from model.batch import IGNORE
from model.tokenizer import Tokenizer
from tests.engine.data.stand_in import prepare_lengths


class Lengths:
    """A mixture of documents of given lengths in a fixed order, without files."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths)
        self.corpus: Any = self
        self.store = self

    def epoch_length(self, epoch: int) -> int:
        return len(self._lengths)

    def documents(self, epoch: int, first: int, last: int) -> np.ndarray:
        return np.roll(np.arange(len(self._lengths)), epoch)[first:last]

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        return self._lengths[documents]


def windows(packer: Packer, epochs: int) -> list[list[Piece]]:
    """Packs of all windows that begin in the first epochs."""
    packs, begin = [], Position()
    while begin.epoch < epochs:
        window = packer.window(begin)
        assert window.end > begin
        packs += window.packs
        begin = window.end
    return packs


def padding_share(packs: list[list[Piece]], tokens_per_pack: int) -> float:
    return 1 - sum(piece.length for pack in packs for piece in pack) / (len(packs) * tokens_per_pack)


def check_coverage(packs: list[list[Piece]], lengths: list[int], epochs: int) -> None:
    """Every token of every document exactly once an epoch; the epoch that is only begun has none twice."""
    pieces = sorted(piece for pack in packs for piece in pack)
    for (epoch, document), group in itertools.groupby(pieces, key=lambda piece: (piece.epoch, piece.document)):
        position = 0
        for piece in group:
            assert piece.start == position and piece.length > 0
            position += piece.length
        assert position == lengths[document] or (epoch >= epochs and position < lengths[document])
    assert {(piece.epoch, piece.document) for piece in pieces} >= {
        (epoch, document) for epoch in range(epochs) for document in range(len(lengths))
    }


NASTY = st.one_of(
    st.lists(st.integers(8, 5000), min_size=1, max_size=150),
    st.lists(st.sampled_from([8, 9, 600, 601, 1024, 1025, 4000]), min_size=1, max_size=300),
    st.lists(st.integers(500, 640), min_size=1, max_size=300),
    st.lists(st.sampled_from([1, 2, 3, 1024]), min_size=1, max_size=1000),
)


@settings(max_examples=120, deadline=None)
@given(lengths=NASTY, context=st.sampled_from([256, 600, 1024]), is_split=st.booleans())
def test_every_token_is_packed_once_an_epoch_and_no_pack_overflows(
    lengths: list[int], context: int, is_split: bool
) -> None:
    packer = Packer(Lengths(lengths), 0, 1024, context, allow_split=is_split)  # type: ignore[arg-type]
    packs = windows(packer, 2)
    check_coverage(packs, lengths, 2)
    for pack in packs:
        assert sum(piece.length for piece in pack) <= 1024
        assert len(pack) <= max_documents(1024)
        assert all(piece.length <= context for piece in pack)
    if is_split:
        full = [pack for pack in packs if len(pack) < max_documents(1024)]
        assert all(sum(piece.length for piece in pack) >= 1024 - 1024 // 256 for pack in full)
    else:
        cuts = sum(piece.start % context != 0 for pack in packs for piece in pack)
        assert cuts == 0


GENERATOR = np.random.default_rng(0)
ORDINARY = {
    "lognormal": np.clip(GENERATOR.lognormal(5.5, 0.8, 20_000), 5, None).astype(int),
    "dialogues": np.clip(GENERATOR.lognormal(6.2, 0.6, 20_000), 30, 4096).astype(int),
    "books": np.clip(GENERATOR.lognormal(9.5, 1.2, 500), 500, None).astype(int),
    "small": np.clip(GENERATOR.lognormal(5.5, 0.8, 60), 5, None).astype(int),
}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("tokens_per_pack", [4096, 16384])
def test_padding_stays_below_half_a_percent_in_pretraining(kind: str, tokens_per_pack: int) -> None:
    lengths = ORDINARY[kind].tolist()
    packer = Packer(Lengths(lengths), 0, tokens_per_pack, 4096)  # type: ignore[arg-type]
    assert padding_share(windows(packer, 2), tokens_per_pack) <= 1 / 256


@pytest.mark.parametrize("kind", ["lognormal", "dialogues"])
@pytest.mark.parametrize("tokens_per_pack", [4096, 16384])
def test_padding_stays_below_three_percent_without_splitting(kind: str, tokens_per_pack: int) -> None:
    packer = Packer(Lengths(ORDINARY[kind].tolist()), 0, tokens_per_pack, 4096, False)  # type: ignore[arg-type]
    assert padding_share(windows(packer, 1), tokens_per_pack) < 0.03


def test_few_documents_are_split_to_fill_gaps() -> None:
    """Concatenation would split one document a pack."""
    lengths = ORDINARY["lognormal"].tolist()
    packs = windows(Packer(Lengths(lengths), 0, 4096, 4096), 1)  # type: ignore[arg-type]
    assert sum(piece.start > 0 for pack in packs for piece in pack) < 0.05 * len(packs)


def test_tiny_documents_beside_long_ones_neither_overflow_nor_waste() -> None:
    lengths = [10 if number % 10 else 2000 for number in range(5000)]
    packs = windows(Packer(Lengths(lengths), 0, 4096, 4096), 1)  # type: ignore[arg-type]
    assert max(map(len, packs)) <= max_documents(4096)
    assert padding_share(packs, 4096) < 0.01


def test_a_window_is_a_function_of_where_it_begins() -> None:
    lengths = ORDINARY["lognormal"].tolist()
    first = Packer(Lengths(lengths), 0, 4096, 1024)  # type: ignore[arg-type]
    again = Packer(Lengths(lengths), 0, 4096, 1024)  # type: ignore[arg-type]
    second = first.window(first.window(Position()).end)
    assert again.window(first.window(Position()).end) == second
    assert second.packs != first.window(Position()).packs


def test_packs_of_a_window_are_shuffled() -> None:
    """Best fit decreasing leaves the long documents in front; training must not see them first."""
    lengths = ORDINARY["lognormal"].tolist()
    counts = [len(pack) for pack in Packer(Lengths(lengths), 0, 4096, 4096).window(Position()).packs]  # type: ignore[arg-type]
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.3


def test_every_window_is_shuffled_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 256 * 1024)
    packer = Packer(Lengths([1024] * 1000), 0, 1024, 1024)  # type: ignore[arg-type]
    first = packer.window(Position())
    second = packer.window(first.end)
    orders = [[pack[0].document for pack in window.packs] for window in (first, second)]
    assert sorted(orders[0]) == list(range(256)) and sorted(orders[1]) == list(range(256, 512))
    assert orders[1] != [document + 256 for document in orders[0]]


def test_the_chapters_of_a_book_are_spread_over_steps() -> None:
    """Eight books of 100 pieces: a step of eight pieces holds those of 5.3 books on average, if they are mixed."""
    packer = Packer(Lengths([100 * 64] * 8), 0, 256, 64)  # type: ignore[arg-type]
    packs = packer.window(Position()).packs
    steps = [packs[index] + packs[index + 1] for index in range(0, len(packs), 2)]
    books = [len({piece.document for piece in step}) for step in steps]
    assert 4.8 < sum(books) / len(books) < 5.8
    assert min(books) >= 2


# Batches


def test_segments_targets_and_positions_of_a_batch(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [7, 30])])
    short, long = corpus.read(0), corpus.read(1)
    pack = [Piece(0, 1, 0, 10), Piece(0, 0, 0, 7), Piece(0, 1, 20, 10)]
    batch = build_batch(corpus, pack, tokens_per_pack=40, context=10)
    assert batch.num_documents == 3 and batch.max_seqlen == 10
    # The tail of 13 tokens is cut at the context length; the rest of the bounds repeats T.
    assert batch.cu_seqlens[:6].tolist() == [0, 10, 17, 27, 37, 40]
    assert len(batch.cu_seqlens) == max_documents(40) + 4 + 1 and set(batch.cu_seqlens[6:].tolist()) == {40}
    assert batch.tokens[:27].tolist() == [*long[:10], *short, *long[20:]]
    # The first piece ends inside its document, so its last target is known; the others end with theirs.
    assert batch.targets.tolist() == [*long[1:11], *short[1:], IGNORE, *long[21:], IGNORE, *[IGNORE] * 13]
    expected = [*range(10), *range(7), *range(10), *range(10), *range(3)]
    assert batch.positions.tolist() == expected


def test_batch_of_nothing_has_no_targets_and_short_segments(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [7, 30])])
    batch = build_batch(corpus, [], tokens_per_pack=40, context=16)
    assert batch.num_documents == 0
    assert (batch.targets == IGNORE).all()
    assert batch.cu_seqlens[:4].tolist() == [0, 16, 32, 40]


def test_every_token_but_the_first_of_each_document_is_a_target_once(tmp_path: Path) -> None:
    lengths = [3, 50, 51, 9, 200]
    corpus = open_corpus([prepare_lengths(tmp_path / "1", lengths)])
    packer = Packer(Mixture(corpus, 0), 0, 64, 16)
    found: list[int] = []
    for pack in windows(packer, 1):
        batch = build_batch(corpus, [piece for piece in pack if piece.epoch == 0], 64, 16)
        found += batch.targets[batch.targets != IGNORE].tolist()
    expected = [token for document in range(len(lengths)) for token in corpus.read(document)[1:].tolist()]
    assert sorted(found) == sorted(expected)


def test_real_text_is_packed_without_padding(real_data: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    directory = prepare([real_data / "pretrain"], tokenizer, tmp_path / "out", ReadOptions(), workers=1)
    mixture = Mixture(open_corpus([directory]), 0)
    packs = windows(Packer(mixture, 0, 4096, 1024), 1)
    assert padding_share(packs, 4096) < 0.001
    packs = windows(Packer(mixture, 0, 4096, 4096, allow_split=False), 1)
    assert padding_share(packs, 4096) < 0.01


def test_evaluation_reads_every_document_once_on_any_number_of_ranks(tmp_path: Path) -> None:
    lengths = [int(length) for length in np.random.default_rng(1).integers(3, 60, 150)]
    corpus = open_corpus([prepare_lengths(tmp_path / "1", lengths)])
    expected = sorted(token for document in range(150) for token in corpus.read(document)[1:].tolist())
    for world in (1, 2, 3):
        ranks = [list(evaluation_batches(corpus, 64, 32, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for batches in ranks for batch in batches]
        targets = [token for batch in batches for token in batch.targets[batch.targets != IGNORE].tolist()]
        assert sorted(targets) == expected


def test_evaluation_of_some_tokens_takes_the_same_ones_each_time(tmp_path: Path) -> None:
    corpus = open_corpus([prepare_lengths(tmp_path / "1", [20] * 500)])
    first = list(evaluation_batches(corpus, 64, 32, max_tokens=1000))
    again = list(evaluation_batches(corpus, 64, 32, max_tokens=1000))
    assert sum(batch.num_documents for batch in first) == 50
    assert all((one.tokens == other.tokens).all() for one, other in zip(first, again, strict=True))
