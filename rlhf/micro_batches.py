"""Shares of a trajectory: minibatches that take a step each, in micro-batches of balanced size for each rank.

Which samples a minibatch holds is a function of (seed, iteration, epoch) alone, whatever the number of ranks, and an
epoch holds every sample once. A minibatch is dealt to world x n bins, largest samples first, each to the emptiest bin
(Graham 1969); n is the smallest for which no bin overflows. All bins of a minibatch have one length, a multiple of an
eighth of the capacity, so that few shapes occur.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.data.loader import packed_batch, pinned
from engine.data.permutation import Permutation
from engine.mesh import Runtime
from model.batch import IGNORE, PackedBatch
from rlhf.trajectory import Trajectory

_LENGTHS = 8  # different lengths of micro-batches, at most
_ROWS = 16  # what the number of samples that one has room for is a multiple of


@dataclass(frozen=True)
class Slice:
    """A micro-batch: whole samples of a trajectory, packed, and nothing where a rank has none left.

    batch: T' tokens; targets are the actions.
    where: int64 [T'], each token's place in the trajectory; -1 behind the samples.
    filled: tokens of the samples.
    trajectory: what is known of them, for `take`.
    """

    batch: PackedBatch
    where: Tensor
    filled: int
    trajectory: Trajectory

    @property
    def tokens(self) -> Tensor:
        return self.batch.tokens

    @property
    def actions(self) -> Tensor:
        """bool [T']"""
        return self.batch.targets != IGNORE

    def take(self, values: Tensor) -> Tensor:
        """[T'] of a trajectory's [T]; 0 behind the samples."""
        return values[self.where.clamp(min=0)].where(self.where >= 0, 0)

    def put(self, values: Tensor, into: Tensor) -> None:
        """Write [T'] into a trajectory's [T], in place."""
        into[self.where[: self.filled]] = values[: self.filled].to(into.dtype)

    def to(self, device: torch.device | str) -> Slice:
        """The same micro-batch on another device; the trajectory stays where it is."""
        return replace(self, batch=self.batch.to(device), where=self.where.to(device, non_blocking=True))


def minibatches(trajectory: Trajectory, count: int, seed: int, iteration: int, epoch: int) -> list[np.ndarray]:
    """An epoch's samples in random order, in `count` parts whose numbers of samples differ by at most one."""
    samples = trajectory.num_samples
    assert count <= samples
    order = Permutation(samples, seed, "minibatches", iteration, epoch)(np.arange(samples))
    return np.array_split(order, count)


def micro_batches(
    trajectory: Trajectory, samples: np.ndarray, capacity: int, rank: int = 0, world: int = 1
) -> list[Slice]:
    """A rank's share of some samples: as many micro-batches on every rank, all of one shape.

    Args:
        samples: int64, numbers of samples.
        capacity: most tokens of a micro-batch; no sample of the trajectory is longer.
    """
    lengths, step = trajectory.lengths, -(-capacity // _LENGTHS)
    bins = _deal(samples, lengths, capacity, world)
    longest = int(lengths.max())
    length = min(_multiple(max(int(lengths[own].sum()) for own in bins), step), capacity)
    most = _multiple(max(map(len, bins)), _ROWS)
    max_seqlen = min(_multiple(longest, step), capacity)
    # What is behind the samples is cut at the longest of them, so that it takes no positions that the model lacks.
    return [_slice(trajectory, own, length, most, longest, max_seqlen) for own in bins[rank::world]]


def _multiple(number: int, of: int) -> int:
    """Rounded up to a multiple."""
    return -(-number // of) * of


def _deal(samples: np.ndarray, lengths: np.ndarray, capacity: int, world: int) -> list[list[int]]:
    """The fewest bins, a multiple of `world`, that hold the samples; fullest first."""
    order = sorted(samples.tolist(), key=lambda sample: (-lengths[sample], sample))
    assert lengths[order[0]] <= capacity, "a sample is longer than a micro-batch"
    count = world * -(-int(lengths[samples].sum()) // (world * capacity))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, index) for index in range(count)]
        for sample in order:
            load, index = loads[0]
            bins[index].append(sample)
            heapq.heapreplace(loads, (load + int(lengths[sample]), index))
        if max(loads)[0] <= capacity:
            return [bins[index] for _, index in sorted(loads, key=lambda load: (-load[0], load[1]))]
        count += world


def _slice(
    trajectory: Trajectory, samples: Sequence[int], length: int, most: int, longest: int, max_seqlen: int
) -> Slice:
    spans = [np.arange(trajectory.bounds[sample], trajectory.bounds[sample + 1]) for sample in samples]
    where = np.concatenate([np.empty(0, np.int64), *spans])
    filled, gap = len(where), (0, length - len(where))
    tokens, targets = (values[where] for values in trajectory.on_host)
    batch = packed_batch(
        np.pad(tokens, gap),
        np.pad(targets, gap, constant_values=IGNORE),
        [len(span) for span in spans],
        most,
        longest,
        index=0,
    )
    own = Slice(
        replace(batch, max_seqlen=max_seqlen), pinned(np.pad(where, gap, constant_values=-1)), filled, trajectory
    )
    return own.to(trajectory.tokens.device)


@torch.no_grad()
def each_token(
    trajectory: Trajectory,
    slices: Sequence[Slice],
    compute: Callable[[PackedBatch], Tensor],
    runtime: Runtime,
) -> Tensor:
    """A number for each token from a model, each rank for its own samples: fp32 [T], on every rank.

    Args:
        slices: this rank's; all ranks' together hold every sample once.
        compute: [T'] of a batch.
    """
    values = torch.zeros(len(trajectory.tokens), dtype=torch.float32, device=trajectory.tokens.device)
    for own in slices:
        own.put(compute(own.batch), values)
    return runtime.sum(values)
