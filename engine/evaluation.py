"""Means over held-out data, such as the loss on texts, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from engine.mesh import Runtime
from engine.shard import free_gathered
from engine.step import MicroBatch, Objective


def held_out_loss(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[MicroBatch],
    runtime: Runtime,
    beat: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats a target token over all ranks' batches; see `held_out_means`."""
    return held_out_means(model, objective, batches, runtime, beat)[0]


@torch.no_grad()
def held_out_means(
    model: nn.Module,
    objective: Objective,
    batches: Iterable[MicroBatch],
    runtime: Runtime,
    beat: Callable[[], None] = lambda: None,
) -> list[float]:
    """The loss, and what else the objective shows, divided by the count over all ranks' batches.

    Args:
        batches: this rank's share; the same number on every rank (some may hold no target), or FSDP's
            gathers would wait for each other.
        beat: called after every batch, for whoever watches that the run moves.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    for number, batch in enumerate(batches):
        own = objective(model, batch.to(runtime.device)).sums()
        sums = sums + own if number else own
        beat()
    free_gathered(model)
    total, count, *shown = runtime.sum(sums).tolist()
    return [value / count if count else math.nan for value in (total, *shown)]


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
