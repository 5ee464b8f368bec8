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

from engine.data.permutation import Permutation
from engine.mesh import Runtime
from model.batch import IGNORE, PackedBatch
from rlhf.trajectory import Trajectory

_LENGTHS = 8  # different lengths of micro-batches, at most
_ROWS = 16  # what the number of their segments is a multiple of


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
    bins = _deal(samples, trajectory.lengths, capacity, world)
    step = -(-capacity // _LENGTHS)
    length, longest = (
        min(_multiple(tokens, step), capacity)
        for tokens in (max(int(trajectory.lengths[own].sum()) for own in bins), int(trajectory.lengths.max()))
    )
    # Positions behind the samples, too, must be ones that the model knows.
    tail = int(trajectory.lengths.max())
    rows = _multiple(max(len(own) for own in bins) + -(-length // tail), _ROWS)
    return [_slice(trajectory, own, length, rows, tail, longest) for own in bins[rank::world]]


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


def _slice(trajectory: Trajectory, samples: Sequence[int], length: int, rows: int, tail: int, max_seqlen: int) -> Slice:
    begins, ends = trajectory.bounds[:-1][samples], trajectory.bounds[1:][samples]
    bounds = np.append(0, np.cumsum(ends - begins)).tolist()
    filled = bounds[-1]
    where = np.full(length, -1, np.int64)
    spans = [np.arange(*span) for span in zip(begins, ends, strict=True)]
    where[:filled] = np.concatenate([np.empty(0, np.int64), *spans])
    while bounds[-1] < length:
        bounds.append(min(bounds[-1] + tail, length))
    positions = np.arange(length) - np.repeat(bounds[:-1], np.diff(bounds))
    cu_seqlens = np.full(rows + 1, length, np.int32)
    cu_seqlens[: len(bounds)] = bounds

    device = trajectory.tokens.device
    at, *rest = (torch.from_numpy(values).to(device) for values in (where, positions, cu_seqlens))
    following = (at + 1).clamp(min=0, max=len(trajectory.tokens) - 1)
    is_action = trajectory.actions[at.clamp(min=0)] & (at >= 0)
    batch = PackedBatch(
        tokens=trajectory.tokens[at.clamp(min=0)].where(at >= 0, 0),
        positions=rest[0],
        cu_seqlens=rest[1],
        targets=trajectory.tokens[following].where(is_action, IGNORE),
        num_documents=len(samples),
        max_seqlen=max_seqlen,
    )
    return Slice(batch, at, filled, trajectory)


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
