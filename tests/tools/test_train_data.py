"""The documents of the training benchmark: their lengths, and that all contenders see the same ones."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import IGNORE
from tools.train_cases import KINDS, Kind
from tools.train_data import Step, lengths, loader_of, made_up_corpus, steps_of

CONTEXT, VOCABULARY, PACK = 64, 160, 256


def steps(kind: Kind, directory: Path, count: int = 2) -> tuple[list[Step], list[list]]:
    """A peer's steps, and the packs of another loader of the same documents."""
    corpus = made_up_corpus(kind, CONTEXT, VOCABULARY, 4000, 0, directory)
    with closing(loader_of(corpus, kind, 0, PACK, CONTEXT, 2)) as loader:
        made = steps_of(loader, kind, CONTEXT, count)
    with closing(loader_of(corpus, kind, 0, PACK, CONTEXT, 2)) as loader:
        return made, [loader.next_step() for _ in range(count)]


def test_lengths_follow_the_rule() -> None:
    def totals(kind: Kind) -> np.ndarray:
        return np.array([sum(parts) for parts in lengths(kind, 4096, 2_000_000, 0)])

    assert set(totals("full")) == {4096}
    ragged = totals("ragged")
    assert np.median(ragged) == pytest.approx(4096 / 8, rel=0.1) and ragged.min() >= 16 and ragged.max() == 4096
    talks = lengths("sft", 4096, 2_000_000, 0)
    turns = np.bincount([len(parts) // 2 for parts in talks]) / len(talks)
    assert turns[1:] == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8], abs=0.03)
    assert np.median([parts[1] for parts in talks]) == pytest.approx(4096 / 16, rel=0.1)
    assert all(sum(parts) <= 4096 for parts in talks)
    pairs = lengths("reward", 4096, 200_000, 0)
    assert all(len(parts) == 3 and parts[0] + max(parts[1:]) <= 4096 for parts in pairs)
    assert pairs == lengths("reward", 4096, 200_000, 0) != lengths("reward", 4096, 200_000, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_peers_train_on_the_very_targets_of_our_packs(kind: Kind, tmp_path: Path) -> None:
    made, packs = steps(kind, tmp_path)
    for step, step_packs in zip(made, packs, strict=True):
        batches = [getattr(pack, "batch", pack) for pack in step_packs]
        assert step.tokens == sum(int(batch.cu_seqlens[batch.num_documents]) for batch in batches)
        for units in (1, 3, 100):
            rows = step.batches(units)
            for name in ("tokens", "targets"):
                empty = 0 if name == "tokens" else IGNORE
                theirs = torch.cat([getattr(one, name).flatten() for one in rows])
                ours = torch.cat([getattr(batch, name) for batch in batches])
                assert torch.equal(theirs[theirs != empty].sort()[0], ours[ours != empty].sort()[0])


@pytest.mark.parametrize("kind", ["full", "ragged"])
def test_pre_training_rows_are_as_long_as_the_context(kind: Kind, tmp_path: Path) -> None:
    made, packs = steps(kind, tmp_path)
    assert {tuple(rows.tokens.shape) for rows in made[0].batches(2)} == {(2, CONTEXT)}
    assert torch.equal(made[0].batches(8)[0].tokens.flatten(), torch.cat([pack.tokens for pack in packs[0]]))


def test_only_answers_are_trained_and_rows_are_whole_conversations(tmp_path: Path) -> None:
    made, packs = steps("sft", tmp_path)
    assert len(made[0].units) == sum(pack.num_documents for pack in packs[0])
    assert 0 < made[0].targets < made[0].tokens
    for rows in made[0].batches(4):
        ends = (rows.tokens != 0).sum(1) - 1
        assert torch.equal(ends, rows.ends)
        # The last answer is trained to its end, and nothing behind it.
        assert (rows.targets.gather(1, rows.ends[:, None] - 1) != IGNORE).all()
        assert (rows.targets.gather(1, rows.ends[:, None]) == IGNORE).all()


def test_pairs_stay_together_the_better_answer_first(tmp_path: Path) -> None:
    made, packs = steps("reward", tmp_path)
    assert made[0].targets == len(made[0].units)
    assert all(len(unit) == 2 for unit in made[0].units)
    for pack in packs[0]:
        grades = pack.grades[pack.is_sequence].view(-1, 2)
        assert (grades[:, 0] > grades[:, 1]).all()
    for rows in made[0].batches(3):
        better, worse = rows.tokens[0::2], rows.tokens[1::2]
        assert torch.equal(better[:, :4], worse[:, :4])  # prompts have four tokens at least


def test_rows_of_similar_lengths_share_a_batch(tmp_path: Path) -> None:
    made, _ = steps("sft", tmp_path)
    widths = [rows.tokens.shape[1] for rows in made[0].batches(4)]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[-1]
