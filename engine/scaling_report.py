"""FSDP and HSDP side by side over a range of clusters: time, bytes and memory of a step, and what to choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from engine.communication import collectives
from engine.memory import Setup, plan
from engine.memory_advice import DEVICES, GIB
from engine.metrics import PEAKS
from engine.recompute import Recompute
from engine.scaling import GPUS_PER_NODE, NVLINK, Cluster, StepTime, sent_between_nodes, step_time
from model.config import ModelConfig

MEMORY = {
    name: int(DEVICES[device] * GIB)
    for name, device in {"A100": "A100 or H100 80 GB", "H100": "A100 or H100 80 GB", "H200": "H200"}.items()
}
# A difference that the model's assumptions could turn round.
NOTICEABLE = 0.01
# Packs are looked for in steps of this many tokens, up to so many.
GRAIN, MOST_TOKENS = 1024, 1 << 20


@dataclass(frozen=True)
class Row:
    """One way to spread a model over a cluster. sent, between_nodes: bytes of a rank; needed: of its memory."""

    setup: Setup
    time: StepTime
    sent: float
    between_nodes: float
    needed: int
    fits: bool

    @property
    def name(self) -> str:
        return "FSDP" if self.setup.replicas == 1 else f"HSDP, {self.setup.replicas} copies"


def compare(config: ModelConfig, one_gpu: Setup, gpus: Sequence[int], cluster: Cluster) -> list[Row]:
    """Every number of GPUs, sharded over all of them, and where there are several nodes, over each.

    Args:
        one_gpu: a step as every GPU takes it; its world and replicas are set here.
    """
    setups = []
    for world in gpus:
        setups.append(replace(one_gpu, world=world, replicas=1))
        if world > GPUS_PER_NODE:
            setups.append(replace(one_gpu, world=world, replicas=world // GPUS_PER_NODE))
    return [_row(config, setup, cluster) for setup in setups]


def _row(config: ModelConfig, setup: Setup, cluster: Cluster) -> Row:
    moved, memory = collectives(config, setup), plan(config, setup)
    return Row(
        setup,
        step_time(config, setup, cluster),
        sum(each.sent for each in moved),
        sum(sent_between_nodes(each, setup) for each in moved),
        memory.needed_bytes,
        memory.fits(MEMORY[cluster.gpu]),
    )


def longest_pack(config: ModelConfig, setup: Setup, device_bytes: int) -> int:
    """Tokens of the longest document, in a pack of its own, that a rank has memory for: a multiple of 1024, or 0."""

    def fits(grains: int) -> bool:
        tokens = grains * GRAIN
        return plan(replace(config, context=tokens), replace(setup, tokens_per_pack=tokens, context=tokens)).fits(
            device_bytes
        )

    low, high = 0, MOST_TOKENS // GRAIN + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * GRAIN


def verdict(rows: Sequence[Row]) -> str:
    """From how many GPUs on HSDP is worth its memory."""
    pairs = {}
    for fsdp in rows:
        for hsdp in rows:
            if fsdp.setup.world == hsdp.setup.world and fsdp.setup.replicas < hsdp.setup.replicas:
                pairs[fsdp.setup.world] = fsdp, hsdp
    if not pairs:
        return "On one node there is only FSDP."
    if not any(hsdp.fits for _, hsdp in pairs.values()):
        return "A copy of the model does not fit a node: only FSDP over several does."
    gains = {world: fsdp.time.total / hsdp.time.total for world, (fsdp, hsdp) in pairs.items() if hsdp.fits}
    better = [world for world, gain in gains.items() if gain > 1 + NOTICEABLE]
    if not better:
        return "Nowhere is HSDP faster by more than 1%: stay with FSDP, which needs less memory."
    ratios = sorted({f"{gains[world]:.2f}" for world in better}, key=float)
    span = f"{ratios[0]} to {ratios[-1]}" if len(ratios) > 1 else ratios[0]
    is_for_good = better == [world for world in gains if world >= better[0]]
    where = f"From {better[0]} GPUs on" if is_for_good else f"On {', '.join(map(str, better))} GPUs alone"
    return f"{where} HSDP is {span} times as fast: --parallel.replicas GPUs/{GPUS_PER_NODE}."


def report(
    config: ModelConfig, one_gpu: Setup, gpus: Sequence[int], cluster: Cluster, batch_tokens: int | None = None
) -> str:
    """FSDP beside HSDP as a table for a terminal.

    Args:
        batch_tokens: of all GPUs together, where that is fixed: fewer micro-batches are left for each of more GPUs.
    """
    rows, told = [], []
    for world in gpus:
        step = one_gpu
        if batch_tokens is not None:
            packs = batch_tokens // one_gpu.tokens_per_pack
            if packs < world:
                told.append(f"{world:>5}  more GPUs than the {packs} micro-batches of a step: give a larger batch")
                continue
            step = replace(one_gpu, micro_batches=math.ceil(packs / world))
        found = compare(config, step, [world], cluster)
        told += map(_line, found)
        rows += found
    headings = (
        ("", "", "sent", "off node", "computing", "moving", "waiting", "", "needed"),
        ("GPUs", "sharding", "GB", "GB", "ms", "ms", "ms", "%", "GiB"),
    )
    lines = [
        f"{cluster.gpu}: {PEAKS[cluster.gpu] / 1e12:.0f} TFLOP/s, of which {cluster.mfu:.0%} are reached; NVLink "
        f"{NVLINK[cluster.gpu] / 1e9:.0f} GB/s; network of a node {cluster.network / 1e9:g} GB/s.",
        _of_step(one_gpu, batch_tokens),
        *(_columns(*heading) for heading in headings),
        *told,
    ]
    return "\n".join([*lines, verdict(rows)] if rows else lines)


def _of_step(setup: Setup, batch_tokens: int | None) -> str:
    several = "es" if setup.micro_batches > 1 else ""
    share = (
        f"{setup.micro_batches} micro-batch{several} a GPU"
        if batch_tokens is None
        else f"{batch_tokens:,} tokens of all GPUs"
    )
    return (
        f"A step: {share}, micro-batches of {setup.tokens_per_pack:,} tokens, documents of {setup.context:,}, "
        f"{setup.precision}, recompute {setup.recompute}."
    )


def _line(row: Row) -> str:
    time = row.time
    milliseconds = (f"{seconds * 1e3:,.0f}" for seconds in (time.computing, time.moving, time.exposed))
    moved = (f"{size / 1e9:.1f}" for size in (row.sent, row.between_nodes))
    share, needed = f"{100 * time.exposed / time.total:.1f}", f"{row.needed / GIB:.1f}"
    line = _columns(str(row.setup.world), row.name, *moved, *milliseconds, share, needed)
    return line if row.fits else f"{line}  does not fit"


def _columns(gpus: str, sharding: str, *numbers: str) -> str:
    widths = (8, 11, 11, 9, 9, 7, 8)
    return f"{gpus:>5}  {sharding:<15}" + "".join(
        f"{text:>{width}}" for text, width in zip(numbers, widths, strict=True)
    )


def longest_packs(config: ModelConfig, one_gpu: Setup, gpus: Sequence[int], cluster: Cluster) -> str:
    """How long a document may be, by recompute mode and by GPUs that share a copy of the model."""
    memory = MEMORY[cluster.gpu]
    lines = [
        f"Longest document, in a pack of its own, that {memory / GIB:.1f} GiB have room for, in tokens; by the GPUs "
        "that share a copy of the model:",
        f"{'recompute':<10}" + "".join(f"{count:>9}" for count in gpus),
    ]
    for mode in get_args(Recompute):
        setups = [replace(one_gpu, world=count, replicas=1, recompute=mode) for count in gpus]
        found = (longest_pack(config, setup, memory) for setup in setups)
        lines.append(f"{mode:<10}" + "".join(f"{f'{tokens:,}' if tokens else 'none':>9}" for tokens in found))
    return "\n".join(lines)
