"""What an optimizer step moves between ranks, from shapes alone: every collective, in the order that FSDP2 issues them.

With S ranks that share a copy of the model, R copies, M micro-batches, b bytes a computed number, and a model of P
entries of which Q are trained, a rank hands to collectives, a step:

    all-gather       M b P of the forward pass, once more for the backward pass but for the root's; over S ranks. Where
                     weights stay gathered b P
    reduce-scatter   M 4 Q, over S ranks: gradients are added up in fp32, and stay sharded between micro-batches
    all-reduce       4 Q / S over R ranks, after the last micro-batch only; and some totals over all ranks

In a ring of n ranks each sends (n-1)/n of what is gathered or scattered, and twice that of what is all-reduced.
What a block keeps or computes again changes nothing here: its forward pass runs twice on weights gathered once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from engine.memory_heads import FP32
from engine.memory_setup import Setup
from engine.units import all_shapes, block_unit, root_unit, score_unit, trained_shapes
from model.config import ModelConfig

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
FP64 = 8
# Of the totals that all ranks agree on, beside a busy time each: squared norm, votes, loss, count.
TOTALS = 4


@dataclass(frozen=True)
class Collective:
    """One collective of a rank.

    unit: whose weights or gradients, such as "root" or "block 3".
    group: "shard", the ranks that share a copy of the model; "replicate", those with the same part of every copy.
    ranks: of the group.
    size: bytes of the whole: what a gather ends with, what a scatter begins with.
    """

    kind: Kind
    unit: str
    group: Literal["shard", "replicate", "world"]
    ranks: int
    size: int

    @property
    def sent(self) -> float:
        """Bytes that each rank of a ring sends."""
        return (2 if self.kind == "all_reduce" else 1) * (self.ranks - 1) / self.ranks * self.size


@dataclass(frozen=True)
class Compute:
    """Forward or backward pass of a unit; the head's are one, as its gradient is formed with the loss."""

    unit: str
    is_backward: bool = False


@dataclass(frozen=True)
class Wait:
    """Computing goes on when a collective is done; None: when all are."""

    collective: Collective | None


Event = Collective | Compute | Wait


def collectives(config: ModelConfig, setup: Setup, shown: int = 0) -> list[Collective]:
    """Those of one optimizer step, in order; where a group has one rank there are none.

    Args:
        config: of a `CausalLM`, or of a `ScalarModel` where its head is score.
        shown: further numbers that the objective has summed over ranks.
    """
    return [event for event in step_events(config, setup, shown) if isinstance(event, Collective)]


def step_events(config: ModelConfig, setup: Setup, shown: int = 0) -> list[Event]:
    """One optimizer step as the host issues it: collectives run beside what is computed until they are waited for."""
    step = _Step(config, setup)
    events = [event for index in range(setup.micro_batches) for event in step.micro_batch(index)]
    totals = Collective("all_reduce", "totals", "world", setup.world, FP64 * (TOTALS + setup.world + shown))
    events += [Wait(None), totals, Wait(None)]
    return [event for event in events if _moves(event)]


def _moves(event: Event) -> bool:
    """Whether there is something to do: a unit may have nothing trained, a group a single rank."""
    collective = event.collective if isinstance(event, Wait) else event
    return not isinstance(collective, Collective) or (collective.ranks > 1 and collective.size > 0)


class _Step:
    def __init__(self, config: ModelConfig, setup: Setup) -> None:
        self.setup, self.layers = setup, config.num_layers
        shapes = all_shapes(config, setup)
        trained = trained_shapes(shapes, setup)
        self.gathered = {"block": setup.number_bytes * block_unit(shapes, setup).padded}
        self.gathered["root"] = setup.number_bytes * root_unit(shapes, setup).padded
        self.gathered["score"] = FP32 * score_unit(shapes, setup).padded  # always computed in fp32
        self.reduced = {"block": FP32 * block_unit(trained, setup).padded}
        self.reduced["root"] = FP32 * root_unit(trained, setup).padded
        self.reduced["score"] = FP32 * score_unit(trained, setup).padded

    def micro_batch(self, index: int) -> Iterator[Event]:
        # What stays gathered after a forward pass stays so for the whole step.
        yield from self._forward(is_gathered=index > 0 and not self.setup.reshard_after_forward)
        yield from self._backward(is_last=index == self.setup.micro_batches - 1)

    def _forward(self, is_gathered: bool) -> Iterator[Event]:
        """Each block's weights are fetched while the one before it computes."""
        if is_gathered:
            yield from (Compute(f"block {layer}") for layer in range(self.layers))
            yield Compute("head")
            return
        yield (root := self._gather("root"))
        yield Wait(root)
        yield (ahead := self._gather("block 0"))
        for layer in range(self.layers):
            yield Wait(ahead)
            if layer + 1 < self.layers:
                yield (ahead := self._gather(f"block {layer + 1}"))
            yield Compute(f"block {layer}")
        yield (score := self._gather("score"))
        yield Wait(score)
        yield Compute("head")

    def _backward(self, is_last: bool) -> Iterator[Event]:
        """The same downwards; one unit's gradients are on their way while the next one's are computed."""
        is_gathered_again = self.setup.reshard_after_forward
        if is_gathered_again:
            yield (ahead := self._gather(f"block {self.layers - 1}"))
        yield from self._reduce("score", is_last)
        before = self._scatter("score")
        for layer in reversed(range(self.layers)):
            if is_gathered_again:
                yield Wait(ahead)
                if layer:
                    yield (ahead := self._gather(f"block {layer - 1}"))
            yield Compute(f"block {layer}", is_backward=True)
            yield Wait(before)
            yield from self._reduce(f"block {layer}", is_last)
            before = self._scatter(f"block {layer}")
        yield Wait(before)
        yield from self._reduce("root", is_last)

    def _gather(self, unit: str) -> Collective:
        return Collective("all_gather", unit, "shard", self.setup.shards, self.gathered[unit.split()[0]])

    def _scatter(self, unit: str) -> Collective:
        return Collective("reduce_scatter", unit, "shard", self.setup.shards, self.reduced[unit.split()[0]])

    def _reduce(self, unit: str, is_last: bool) -> Iterator[Event]:
        scatter = self._scatter(unit)
        yield scatter
        if is_last:
            yield Collective("all_reduce", unit, "replicate", self.setup.replicas, scatter.size // self.setup.shards)
