"""One optimizer step: accumulate, agree on totals in one collective, judge, update.

The loss is a mean over all target tokens of all ranks and micro-batches. That count is known only after the
last micro-batch, so the backward pass divides by a constant (the step's token capacity) and the true
denominator enters with the clipping factor. One all-reduce then carries everything ranks must agree on: loss,
count, squared gradient norm, votes to stop, and how long each rank was busy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from engine.guard import SKIPPED, SKIPPED_IN_A_ROW, Guard
from engine.mesh import Runtime
from engine.optim import AdamW
from engine.shard import set_last_micro_batch
from kernels.grad_norm import grad_norm
from model.batch import IGNORE, PackedBatch


class MicroBatch(Protocol):
    """What one forward and backward pass works on: a `PackedBatch`, or one with what its objective needs beside it."""

    @property
    def tokens(self) -> Tensor:
        """[T], as many for all ranks' n-th micro-batch of a step."""
        ...

    def to(self: M, device: torch.device | str) -> M: ...


M = TypeVar("M", bound=MicroBatch)


class Loss(NamedTuple):
    """A micro-batch's loss as sums: fp32 scalars.

    total: what is minimised, summed over targets
    reported: the part of it that is shown (without regularisers), detached
    count: number (or weight) of targets
    shown: fp32 [M], sums of whatever else is shown divided by the count; as many for every micro-batch
    """

    total: Tensor
    reported: Tensor
    count: Tensor
    shown: Tensor | None = None

    def sums(self) -> Tensor:
        """What is added up over micro-batches and ranks: float64 [2 + M]."""
        sums = torch.stack([self.reported, self.count])
        return (sums if self.shown is None else torch.cat([sums, self.shown])).double()


Objective = Callable[[nn.Module, M], Loss]


def next_token_loss(
    z_loss: float = 0.0, embedding_noise: Callable[[PackedBatch], Tensor] | None = None
) -> Objective[PackedBatch]:
    """Cross-entropy of the next token, plus `z_loss` times the squared log-sum-exp.

    Args:
        embedding_noise: what is added to a batch's embeddings, [T, d].
    """

    def objective(model: nn.Module, batch: PackedBatch) -> Loss:
        noise = None if embedding_noise is None else embedding_noise(batch)
        nll_sum, z_sum = model(batch, cross_entropy=True, z_loss=z_loss, embedding_noise=noise)
        return Loss(nll_sum + z_sum, nll_sum.detach(), count_targets(batch))

    return objective


def count_targets(batch: PackedBatch) -> Tensor:
    """Number of targets, or what they weigh: fp32 scalar."""
    targets = batch.targets != IGNORE
    return (targets if batch.weights is None else batch.weights * targets).sum().float()


@dataclass(frozen=True)
class StepReport:
    """What the host reads, one step late.

    loss: nats a target token; targets: their number; shown: the means of the objective's further sums.
    """

    loss: float
    grad_norm: float
    targets: float
    was_skipped: bool
    skipped: int
    skipped_in_a_row: int
    stop_votes: int
    busy_seconds: list[float]
    shown: list[float]


class PendingReport:
    """A step's numbers on their way to the host.

    finished_at: `time.perf_counter()` when the step was done; on a GPU, when the host learnt of it.
    """

    def __init__(self, values: Tensor, world: int) -> None:
        self._values, self._world, self._event = values, world, None
        self.finished_at = time.perf_counter()
        if values.is_cuda:
            # Only to pinned memory does a copy leave the host free.
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> StepReport:
        """Wait for the numbers, if they have not arrived yet."""
        if self._event is not None:
            self._event.synchronize()
            self.finished_at = time.perf_counter()
        loss, norm, count, was_skipped, skipped, in_a_row, votes, *rest = self._values.tolist()
        busy, shown = rest[: self._world], rest[self._world :]
        return StepReport(loss, norm, count, bool(was_skipped), int(skipped), int(in_a_row), round(votes), busy, shown)


def train_step(
    model: nn.Module,
    optimizer: AdamW,
    guard: Guard,
    objective: Objective[M],
    micro_batches: Sequence[M],
    runtime: Runtime,
    *,
    lr: float,
    wants_stop: bool = False,
    busy_seconds: float = 0.0,
) -> PendingReport:
    """Forward, backward and update over this rank's micro-batches of one global batch.

    Args:
        micro_batches: the same number, of the same size, on every rank; some may hold no target.
        lr: learning rate of this step.
        wants_stop: this rank was asked to end the run.
        busy_seconds: what this rank's previous step took without waiting for others.
    """
    capacity = sum(batch.tokens.numel() for batch in micro_batches) * runtime.world
    sums = torch.zeros((), dtype=torch.float64, device=runtime.device)
    for index, batch in enumerate(micro_batches):
        set_last_micro_batch(model, index == len(micro_batches) - 1)
        loss = objective(model, batch.to(runtime.device))
        # FSDP averages gradients over ranks; the loss is a sum over them.
        (loss.total * (runtime.world / capacity)).backward()
        sums = sums + loss.sums()

    replicas = runtime.mesh.size(0) if runtime.mesh.ndim == 2 else 1
    totals = torch.zeros(2 + runtime.world, dtype=torch.float64, device=runtime.device)
    totals[0] = grad_norm(optimizer.local_gradients()).double() / replicas
    # Filled in and not assigned: what is assigned to one element is copied from the host, which waits for it.
    totals[1].fill_(float(wants_stop))
    totals[2 + runtime.rank].fill_(busy_seconds)
    totals = runtime.sum(torch.cat([totals, sums]))
    squared, votes = totals[:2].unbind()
    _, busy, (reported, count), shown = totals.tensor_split([2, 2 + runtime.world, 4 + runtime.world])

    to_mean = capacity / count.clamp(min=1)
    norm = squared.sqrt() * to_mean
    loss_mean = reported / count.clamp(min=1)
    should_skip = guard.judge(loss_mean, norm)
    clip_scale = to_mean
    if optimizer.config.clip > 0:
        clip_scale = to_mean * (optimizer.config.clip / norm.clamp(min=1e-12)).clamp(max=1.0)
    rate = torch.full((), lr, dtype=torch.float32, device=runtime.device)
    optimizer.step(rate, clip_scale.float(), should_skip)
    optimizer.zero_grad()

    verdict = torch.stack([should_skip, guard.state[SKIPPED], guard.state[SKIPPED_IN_A_ROW]]).double()
    means = torch.stack([loss_mean, norm, count])
    rest = (votes.view(1), busy, shown / count.clamp(min=1))
    return PendingReport(torch.cat([means, verdict, *rest]), runtime.world)
