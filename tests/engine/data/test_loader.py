from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data import packing
from engine.data.corpus import Corpus, open_corpus
from engine.data.loader import PackLoader, build_batch
from engine.data.mixture import Mixture
from engine.data.packing import Packer, Position
from model.batch import IGNORE, PackedBatch
from model.errors import InputError
from tests.engine.data.stand_in import prepare_lengths

T, CONTEXT, PACKS = 128, 32, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Two sources, 400 documents, about 12 steps an epoch."""
    lengths = np.random.default_rng(0).integers(9, 35, 400)
    folder = tmp_path_factory.mktemp("corpus")
    first = prepare_lengths(folder / "1", lengths[:300].tolist())
    return open_corpus([first, prepare_lengths(folder / "2", lengths[300:].tolist(), 300)])


def loader(corpus: Corpus, rank: int = 0, world: int = 1, cursor: dict[str, Any] | None = None, **more: Any) -> Any:
    return closing(PackLoader(corpus, 7, T, CONTEXT, PACKS, rank, world, cursor, **more))


def same(one: PackedBatch, other: PackedBatch) -> bool:
    fields = ("tokens", "positions", "cu_seqlens", "targets")
    return one.num_documents == other.num_documents and all(
        torch.equal(getattr(one, field), getattr(other, field)) for field in fields
    )


def global_steps(corpus: Corpus, world: int, steps: int) -> Iterator[list[PackedBatch]]:
    """The micro-batches of all ranks with text in them, in the global order."""
    loaders = [PackLoader(corpus, 7, T, CONTEXT, PACKS, rank, world) for rank in range(world)]
    try:
        for _ in range(steps):
            ranks = [loader.next_step() for loader in loaders]
            assert {len(batches) for batches in ranks} == {-(-PACKS // world)}
            dealt = [batch for batches in zip(*ranks, strict=True) for batch in batches]
            assert all(batch.num_documents == 0 for batch in dealt[PACKS:])
            yield dealt[:PACKS]
    finally:
        for one in loaders:
            one.close()


def test_every_number_of_ranks_sees_the_same_packs_across_epochs(corpus: Corpus) -> None:
    expected = list(global_steps(corpus, 1, 40))
    for world in (2, 3, 4, 7):
        for step, other in zip(expected, global_steps(corpus, world, 40), strict=True):
            assert all(same(one, another) for one, another in zip(step, other, strict=True))


def test_steps_are_the_packs_of_window_after_window(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """That windows hold every token once an epoch is proved with the packer."""
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 7 * T)
    packer, begin, packs = Packer(Mixture(corpus, 7), 7, T, CONTEXT), Position(), []
    while begin.epoch < 2:
        window = packer.window(begin)
        packs += window.packs
        begin = window.end
    with loader(corpus) as one:
        for first in range(0, len(packs) - PACKS, PACKS):
            expected = [build_batch(corpus, pack, T, CONTEXT) for pack in packs[first : first + PACKS]]
            assert all(same(batch, other) for batch, other in zip(one.next_step(), expected, strict=True))


def test_each_document_comes_once_an_epoch_across_the_boundary(corpus: Corpus) -> None:
    """Documents by their second token to their fifth, which tell them all apart."""
    steps = 3 * corpus.num_tokens // (T * PACKS) + 2
    seen: list[tuple[int, ...]] = []
    for step in global_steps(corpus, 2, steps):
        for batch in step:
            bounds = batch.cu_seqlens[: batch.num_documents + 1].tolist()
            for begin, end in itertools.pairwise(bounds):
                ids = batch.tokens[begin:end].tolist()
                if ids[0] == 256 and len(ids) >= 5:  # beginnings; a piece cut to fewer tokens is counted below
                    seen.append(tuple(ids[1:5]))
    counts = Counter(seen)
    documents = {tuple(corpus.read(number)[1:5].tolist()) for number in range(400)}
    assert len(documents) == 400
    # Three epochs and a little of the fourth; a beginning cut off before its fifth token may be missed once.
    assert set(counts) == documents
    assert sum(count < 3 for count in counts.values()) <= 8
    assert max(counts.values()) <= 4


@pytest.mark.parametrize("is_split", [True, False])
def test_going_on_from_any_cursor_is_going_on(corpus: Corpus, is_split: bool) -> None:
    with loader(corpus, allow_split=is_split) as unbroken:
        cursors, steps = [unbroken.cursor], []
        for _ in range(30):
            steps.append(unbroken.next_step())
            cursors.append(unbroken.cursor)
    for start in (0, 1, 7, 11, 12, 13, 24, 29):
        state = json.loads(json.dumps(cursors[start]))
        with loader(corpus, cursor=state, allow_split=is_split) as resumed:
            for step in steps[start : start + 4]:
                assert all(same(one, other) for one, other in zip(step, resumed.next_step(), strict=True))
            assert resumed.cursor == cursors[min(start + 4, 30)] or start + 4 > 30


def test_cursor_from_one_number_of_ranks_serves_another(corpus: Corpus) -> None:
    with loader(corpus, 1, 3) as before:
        for _ in range(9):
            before.next_step()
        cursor = before.cursor
    with loader(corpus, 0, 1, cursor) as after:
        (*_, tenth) = global_steps(corpus, 1, 10)
        assert all(same(one, other) for one, other in zip(tenth, after.next_step(), strict=True))


def test_cursor_tells_of_steps_handed_out_not_of_those_read_ahead(corpus: Corpus) -> None:
    with loader(corpus) as one:
        assert one.cursor["packs"] == 0
        one.next_step()
        assert one.cursor["packs"] == PACKS
        one._thread.join(timeout=0.2)  # it goes on reading
        assert one.cursor["packs"] == PACKS
        assert all(isinstance(value, (int, str)) for value in one.cursor.values())


def test_shapes_are_the_same_at_every_step(corpus: Corpus) -> None:
    shapes = {
        (tuple(batch.tokens.shape), tuple(batch.cu_seqlens.shape), batch.tokens.dtype, batch.cu_seqlens.dtype)
        for step in global_steps(corpus, 3, 20)
        for batch in step
    }
    assert len(shapes) == 1
    ((tokens, _, token_dtype, bound_dtype),) = shapes
    assert tokens == (T,) and (token_dtype, bound_dtype) == (torch.int64, torch.int32)


def test_padding_and_cuts_are_reported(corpus: Corpus) -> None:
    with loader(corpus) as one:
        padding = cuts = 0
        for _ in range(25):
            for batch in one.next_step():
                end = int(batch.cu_seqlens[batch.num_documents])
                padding += T - end
                starts = batch.tokens[batch.cu_seqlens[: batch.num_documents].long()]
                cuts += int((starts != 256).sum())
        assert one.padding_share == pytest.approx(padding / (25 * PACKS * T))
        assert one.padding_share < 0.01
        assert one.cursor["cuts"] == cuts > 0
        assert one.wait_seconds >= 0


def test_wrong_cursors_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with loader(corpus) as one:
        one.next_step()
        cursor = one.cursor
    for wrong, problem in (({"corpus": "other"}, "made on other data"), ({"seed": 8}, "made with --seed 8, not 7")):
        with pytest.raises(InputError, match=problem):
            PackLoader(corpus, 7, T, CONTEXT, PACKS, cursor=cursor | wrong)
    train, _ = corpus.split(0.1)
    with pytest.raises(InputError, match="held-out"):
        PackLoader(train, 7, T, CONTEXT, PACKS, cursor=cursor)


def test_too_little_data_for_a_step_is_said(corpus: Corpus) -> None:
    with pytest.raises(InputError, match=r"An epoch of the data has [\d,]+ tokens, a step takes 128,000"):
        PackLoader(corpus, 7, T, CONTEXT, 1000)


def test_error_while_reading_ahead_arrives_and_stays(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(corpus.store, "read", broken)
    with loader(corpus) as one:
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                one.next_step()


def test_closing_ends_the_thread(corpus: Corpus) -> None:
    one = PackLoader(corpus, 7, T, CONTEXT, PACKS)
    one.next_step()
    one.close()
    assert not one._thread.is_alive()
    one.close()


def test_targets_of_missing_packs_are_ignored(corpus: Corpus) -> None:
    with loader(corpus, 3, 4) as last:
        batches = last.next_step()
    assert len(batches) == 2
    assert (batches[1].targets == IGNORE).all() and batches[1].num_documents == 0
    assert (batches[0].targets != IGNORE).any()
