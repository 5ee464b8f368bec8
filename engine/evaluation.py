"""Loss on held-out text, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from engine.mesh import Runtime
from engine.shard import free_gathered
from engine.step import Objective
from model.batch import PackedBatch


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[PackedBatch],
    runtime: Runtime,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats a target token over all ranks' batches.

    Args:
        batches: this rank's share; the same number on every rank (some may hold no target), or FSDP's
            gathers would wait for each other.
        beat: called after every batch, for whoever watches that the run moves.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for batch in batches:
        loss = objective(model, batch.to(runtime.device))
        sums += torch.stack([loss.reported, loss.count]).double()
        beat()
    free_gathered(model)
    total, count = runtime.sum(sums).tolist()
    return total / count if count else math.nan


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
