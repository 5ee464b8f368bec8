"""Shares of a trajectory: every sample once, balanced, the same whatever the number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import IGNORE, PackedBatch
from rlhf.micro_batches import Slice, each_token, micro_batches, minibatches
from rlhf.trajectory import Trajectory
from tests.model.tiny import LLAMA, causal_lm
from tests.rlhf.trajectories import ALONE, first_pass, made_of, some_samples


def held(slices: list[Slice]) -> list[int]:
    return sorted(place for own in slices for place in own.where[own.where >= 0].tolist())


def places(trajectory: Trajectory, samples: np.ndarray) -> list[int]:
    bounds = trajectory.bounds
    return sorted(place for sample in samples for place in range(bounds[sample], bounds[sample + 1]))


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 9), samples=st.integers(9, 40), seed=st.integers(0, 99))
def test_an_epoch_holds_every_sample_once(count: int, samples: int, seed: int) -> None:
    trajectory = made_of([(1, 1)] * samples)
    parts = minibatches(trajectory, count, seed, 3, 1)
    assert len(parts) == count
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_each_epoch_iteration_and_seed_has_an_order_of_its_own() -> None:
    trajectory = made_of([(1, 1)] * 30)
    orders = {
        tuple(np.concatenate(minibatches(trajectory, 2, *key)).tolist())
        for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }
    assert len(orders) == 4
    assert tuple(range(30)) not in orders


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=40),
    world=st.integers(1, 5),
    capacity=st.integers(24, 90),
)
def test_ranks_hold_every_sample_once_in_micro_batches_of_one_shape(
    lengths: list[tuple[int, int]], world: int, capacity: int
) -> None:
    trajectory = made_of(lengths)
    samples = np.arange(len(lengths))
    of_ranks = [micro_batches(trajectory, samples, capacity, rank, world) for rank in range(world)]
    every = [own for slices in of_ranks for own in slices]
    assert held(every) == places(trajectory, samples)
    assert len({len(slices) for slices in of_ranks}) == 1
    assert len({(len(own.tokens), len(own.batch.cu_seqlens), own.batch.max_seqlen) for own in every}) == 1
    assert all(own.filled <= len(own.tokens) <= capacity for own in every)
    # The emptiest bin was given the last sample, so no two differ by more than the longest.
    loads = [own.filled for own in every]
    assert max(loads) - min(loads) <= trajectory.lengths.max()


def test_no_fewer_micro_batches_would_hold_them() -> None:
    trajectory = made_of([(4, 4)] * 12)
    for capacity, count in ((96, 1), (95, 2), (48, 2), (47, 3), (8, 12)):
        assert len(micro_batches(trajectory, np.arange(12), capacity)) == count


def test_few_lengths_of_micro_batches_occur() -> None:
    random = np.random.default_rng(0)
    lengths = set()
    for _ in range(50):
        trajectory = made_of([tuple(random.integers(1, 40, 2)) for _ in range(random.integers(1, 30))])
        lengths |= {len(own.tokens) for own in micro_batches(trajectory, np.arange(trajectory.num_samples), 800, 0, 2)}
    assert len(lengths) > 1 and all(length % 100 == 0 for length in lengths)


def test_targets_are_the_actions_and_positions_restart() -> None:
    trajectory = Trajectory.of(some_samples(), "cpu")
    for own in first_pass(trajectory, 2, 40, ALONE):
        where, batch = own.where[: own.filled], own.batch
        assert torch.equal(batch.tokens[: own.filled], trajectory.tokens[where])
        assert torch.equal(own.actions[: own.filled], trajectory.actions[where])
        assert not own.actions[own.filled :].any() and (own.where[own.filled :] == -1).all()
        chosen = own.actions.nonzero().ravel()
        assert torch.equal(batch.targets[chosen], batch.tokens[chosen + 1])
        assert (batch.targets[~own.actions] == IGNORE).all()
        segments = batch.cu_seqlens.diff()
        assert segments.sum() == len(batch.tokens) and segments.max() <= batch.max_seqlen
        expected = torch.cat([torch.arange(int(length)) for length in segments])
        assert torch.equal(batch.positions, expected)
        # Behind the samples, too, only positions that the model has learnt.
        assert batch.positions.max() < trajectory.lengths.max()


def test_fields_are_taken_and_put_back() -> None:
    trajectory = Trajectory.of(some_samples(), "cpu")
    values = torch.randn(len(trajectory.tokens))
    back = torch.full_like(values, torch.nan)
    for own in first_pass(trajectory, 3, 40, ALONE):
        taken = own.take(values)
        assert torch.equal(taken[: own.filled], values[own.where[: own.filled]])
        assert not taken[own.filled :].any()
        own.put(torch.where(own.where >= 0, taken, torch.nan), back)
    assert torch.equal(back, values)


def test_a_micro_batch_says_of_a_sample_what_the_sample_alone_says() -> None:
    model = causal_lm(LLAMA)
    samples = some_samples()
    trajectory = Trajectory.of(samples, "cpu")
    packed = each_token(
        trajectory, first_pass(trajectory, 2, 40, ALONE), lambda batch: model(batch, 0.7).logprob, ALONE
    )
    for number, sample in enumerate(samples):
        ids = torch.tensor(sample.prompt_ids + sample.answer_ids)
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        batch = PackedBatch(ids, torch.arange(len(ids)), bounds, torch.full_like(ids, IGNORE), 1, len(ids))
        logits = model.model(batch.tokens, batch.positions, batch.layout) @ model.head_weight.t()
        at = torch.arange(len(sample.prompt_ids) - 1, len(ids) - 1)
        alone = (logits / 0.7).double().log_softmax(-1)[at, ids[at + 1]]
        begin = trajectory.bounds[number]
        torch.testing.assert_close(packed[begin + at].double(), alone, atol=1e-5, rtol=0)
    assert not packed[~trajectory.actions].any()
