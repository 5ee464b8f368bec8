"""How long a training step takes on a cluster, by datasheet: what computes, what moves meanwhile, and who waits.

The step's own order of events (`engine.communication`) is played on one stream that computes and on links that move:
a collective begins when what it moves is there and its link is free, and what needs it waits for its end.

    computing    2 FLOPs a matrix parameter and token, attention's of full-length causal documents; twice that backward,
                 and the forward pass again where it is recomputed; over MFU x the device's bf16 peak
    collectives  NCCL's own cost model of a ring (src/graph/tuning.cc): a launch, a latency for every hop to the next
                 rank, and the bytes that a rank sends over the speed of the slowest link; of its protocols the faster

Ranks are numbered node by node, as torchrun does, so the ranks of a shard group are neighbours. Each ring that leaves
a node has a share of the node's network as large as the node's share of ranks in it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from engine.communication import Collective, Compute, Wait, step_events
from engine.memory import Setup
from engine.metrics import PEAKS
from model.config import ModelConfig

GPUS_PER_NODE = 8
MICROSECOND = 1e-6


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's ways to send. launch, nvlink, network: seconds; the latter of a hop. share: of a link's speed."""

    launch: float
    nvlink: float
    network: float
    share: float


# src/graph/tuning.cc of NCCL 2.2x, rings: LL128 and Simple. (LL is for messages of kilobytes.)
PROTOCOLS = (
    Protocol(14.0 * MICROSECOND, 1.9 * MICROSECOND, 4.0 * MICROSECOND, 0.92),
    Protocol(8.4 * MICROSECOND, 3.4 * MICROSECOND, 14.0 * MICROSECOND, 1.0),
)

# Bytes a second in each direction between the GPUs of a node: links times what NCCL counts on for each of nominally
# 25 GB/s (src/graph/topo.h: 20.0 of the third generation, 20.6 of the fourth). Datasheets say 300 and 450 GB/s.
NVLINK = {"A100": 12 * 20.0e9, "H100": 18 * 20.6e9, "H200": 18 * 20.6e9}


@dataclass(frozen=True)
class Cluster:
    """Nodes of eight GPUs.

    gpu: a name of `NVLINK`.
    network: bytes a second in each direction, of all the network cards of a node together.
    mfu: share of the peak that is reached while nothing is waited for.
    """

    gpu: str
    network: float
    mfu: float

    def computed_in(self, flops: float) -> float:
        """Seconds."""
        return flops / (self.mfu * PEAKS[self.gpu])

    def moved_in(self, collective: Collective, setup: Setup) -> float:
        """Seconds of a collective that has its links for itself."""
        nodes, neighbours = spread(collective, setup)
        hops = (2 if collective.kind == "all_reduce" else 1) * (collective.ranks - 1)
        between_nodes = (2 if collective.kind == "all_reduce" else 1) * (nodes - 1)
        speed = NVLINK[self.gpu]
        if nodes > 1:
            speed = min(speed, self.network * neighbours / GPUS_PER_NODE)
        return min(
            protocol.launch
            + (hops - between_nodes) * protocol.nvlink
            + between_nodes * protocol.network
            + collective.sent / (protocol.share * speed)
            for protocol in PROTOCOLS
        )


def spread(collective: Collective, setup: Setup) -> tuple[int, int]:
    """Nodes that a collective's group spans, and its ranks on each."""
    if collective.group == "replicate":
        neighbours = max(1, min(setup.replicas, GPUS_PER_NODE // setup.shards))
    else:
        neighbours = min(collective.ranks, GPUS_PER_NODE)
    return -(-collective.ranks // neighbours), neighbours


def sent_between_nodes(collective: Collective, setup: Setup) -> float:
    """Bytes that leave the node, as a share of each of its ranks in the ring."""
    nodes, neighbours = spread(collective, setup)
    return collective.sent / neighbours if nodes > 1 else 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step without its update. moving: of all collectives, however much is hidden."""

    total: float
    computing: float
    moving: float

    @property
    def exposed(self) -> float:
        """Seconds in which nothing computes."""
        return self.total - self.computing


def step_time(config: ModelConfig, setup: Setup, cluster: Cluster) -> StepTime:
    """Play one optimizer step.

    Args:
        config: of a `CausalLM` or `ScalarModel` that is trained whole.
    """
    assert setup.lora is None
    now = computing = moving = 0.0
    free: dict[str, float] = defaultdict(float)  # when a link has moved what it was given
    done: dict[Collective, float] = {}
    scattered: dict[str, float] = {}  # when a unit's gradients are, which are then summed over copies
    for event in step_events(config, setup):
        if isinstance(event, Compute):
            seconds = cluster.computed_in(flops(config, setup, event))
            now, computing = now + seconds, computing + seconds
        elif isinstance(event, Wait):
            now = max([now, *free.values()] if event.collective is None else [now, done[event.collective]])
        else:
            seconds = cluster.moved_in(event, setup)
            link = "network" if spread(event, setup)[0] > 1 else "nvlink"
            is_sum_of_copies = event.group == "replicate"
            begin = max(now, free[link], scattered.get(event.unit, 0.0) if is_sum_of_copies else 0.0)
            done[event] = free[link] = begin + seconds
            moving += seconds
            if event.kind == "reduce_scatter":
                scattered[event.unit] = done[event]
    return StepTime(now, computing, moving)


def flops(config: ModelConfig, setup: Setup, event: Compute) -> float:
    """FLOPs of one event for a rank's pack, filled with documents of the full context."""
    head = config.hidden_size * (config.vocab_size if config.head == "lm" else 1)
    if event.unit == "head":
        return 6.0 * head * setup.tokens_per_pack
    layer = int(event.unit.split()[1])
    matrices = (config.num_matmul_parameters - head) // config.num_layers
    seen = min(setup.context, config.window(layer) or setup.context)
    forward = 2.0 * (matrices + config.num_heads * config.head_dim * seen) * setup.tokens_per_pack
    passes = 1 if not event.is_backward else 3 if setup.recompute == "full" else 2
    return passes * forward
