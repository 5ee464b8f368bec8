"""The model of what a step moves, against the collectives that real training steps issue, recorded one by one.

Steps run on fake tensors over a process group whose collectives do nothing, so any number of ranks can be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.communication import Collective, collectives
from engine.guard import Guard, GuardConfig
from engine.memory import Setup
from engine.mesh import ParallelConfig
from engine.optim import AdamW, OptimConfig
from engine.shard import parallelize
from engine.step import Loss, next_token_loss, train_step
from model.batch import PackedBatch
from model.config import PRESETS, ModelConfig
from model.heads import CausalLM, ScalarModel
from model.lora import add_lora
from tests.engine.test_memory import LORA, SCORE, SMALL, TIED_QWEN3, empty_pack, silent_ranks

WIDE = replace(PRESETS["ziya2-13b"], num_layers=4)
KINDS = {
    "c10d._allgather_base_.default": "all_gather",
    "c10d._reduce_scatter_base_.default": "reduce_scatter",
    "c10d.allreduce_.default": "all_reduce",
}
# The update makes tensors of its own, real ones: above this many parameters steps go without it.
LARGE = 1_000_000_000
Moved = tuple[str, int, int]
"""kind, ranks of the group, bytes of the whole"""


class Recorder(TorchDispatchMode):
    """While active, notes every collective. Fails on a kind that it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[Moved] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            (group,) = (
                dist.ProcessGroup.unbox(argument)
                for argument in args
                if isinstance(argument, torch.ScriptObject) and argument._type().name() == "ProcessGroup"
            )
            size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.log.append((KINDS[str(op)], group.size(), size))
        return op(*args, **(kwargs or {}))


def score_loss(model: nn.Module, pack: PackedBatch) -> Loss:
    """Of a reward model, with two more numbers that are shown."""
    total = model(pack).sum()
    return Loss(total, total.detach(), torch.ones(()), torch.ones(2))


def recorded(config: ModelConfig, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> list[Moved]:
    """The collectives of the second step of a real training loop on rank 0."""
    objective: Callable[..., Loss] = next_token_loss() if config.head == "lm" else score_loss
    with torch.device("meta"):
        model = CausalLM(config) if config.head == "lm" else ScalarModel(config)
        if setup.lora is not None:
            add_lora(model, setup.lora)
    with silent_ranks(setup) as runtime, FakeTensorMode(allow_non_fake_inputs=True):
        parallel = ParallelConfig(replicas=setup.replicas, reshard_after_forward=setup.reshard_after_forward)
        parallelize(model, runtime, parallel, setup.precision, setup.recompute)
        optimizer, guard = AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device)
        if config.num_parameters > LARGE:
            monkeypatch.setattr(optimizer, "step", lambda *_: None)
        packs = [empty_pack(setup.tokens_per_pack, setup.context)] * setup.micro_batches
        for _ in range(2):
            with Recorder() as recorder:
                train_step(model, optimizer, guard, objective, packs, runtime, lr=1e-4)
    return recorder.log


def modelled(config: ModelConfig, setup: Setup) -> list[Moved]:
    shown = 0 if config.head == "lm" else 2
    return [(each.kind, each.ranks, each.size) for each in collectives(config, setup, shown)]


STEPS = {
    "fsdp": (SMALL, Setup(256, 256, world=8)),
    "fsdp, accumulation": (SMALL, Setup(256, 256, world=8, micro_batches=3)),
    "fsdp, fp32": (SMALL, Setup(256, 256, world=4, precision="fp32", micro_batches=2)),
    "fsdp, left gathered": (SMALL, Setup(256, 256, world=8, reshard_after_forward=False, micro_batches=2)),
    "fsdp, selective": (SMALL, Setup(256, 256, world=8, recompute="selective")),
    "fsdp, full": (SMALL, Setup(256, 256, world=8, recompute="full")),
    "fsdp, tied, qk-norm": (TIED_QWEN3, Setup(256, 256, world=8, micro_batches=2)),
    "fsdp, more ranks than rows": (SMALL, Setup(256, 256, world=512)),
    "hsdp": (SMALL, Setup(256, 256, world=64, replicas=8)),
    "hsdp, accumulation": (SMALL, Setup(256, 256, world=64, replicas=8, micro_batches=3)),
    "hsdp, fp32": (SMALL, Setup(256, 256, world=8, replicas=2, precision="fp32", micro_batches=2)),
    "hsdp, left gathered": (SMALL, Setup(256, 256, world=8, replicas=2, reshard_after_forward=False)),
    "hsdp, tied": (TIED_QWEN3, Setup(256, 256, world=8, replicas=4, micro_batches=2)),
    "copies that are whole": (SMALL, Setup(256, 256, world=4, replicas=4, micro_batches=2)),
    "one rank": (SMALL, Setup(256, 256, precision="fp32")),
    "adapters, fsdp": (SMALL, Setup(256, 256, world=8, micro_batches=2, lora=LORA)),
    "adapters, hsdp": (SMALL, Setup(256, 256, world=8, replicas=2, micro_batches=2, lora=LORA)),
    "adapters, fp32": (SMALL, Setup(256, 256, world=8, precision="fp32", lora=LORA)),
    "adapters and words": (
        SMALL,
        Setup(256, 256, world=4, replicas=2, lora=replace(LORA, trained=("embed_tokens", "lm_head"))),
    ),
    "score, fsdp": (SCORE, Setup(256, 256, world=8, micro_batches=2)),
    "score, hsdp": (SCORE, Setup(256, 256, world=8, replicas=2, micro_batches=2)),
    "score, adapters, fsdp": (
        SCORE,
        Setup(256, 256, world=8, micro_batches=2, lora=replace(LORA, trained=("score",))),
    ),
    "score, adapters, head frozen": (SCORE, Setup(256, 256, world=8, replicas=2, lora=LORA)),
    "13b, fsdp on 512 ranks": (WIDE, Setup(4096, 4096, world=512)),
    "13b, hsdp on 512 ranks": (WIDE, Setup(4096, 4096, world=512, replicas=64, micro_batches=2)),
}


@pytest.mark.parametrize("name", STEPS)
def test_model_moves_what_a_step_moves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, setup = STEPS[name]
    assert modelled(config, setup) == recorded(config, setup, monkeypatch)


def test_one_rank_moves_nothing() -> None:
    assert collectives(SMALL, Setup(256, 256, micro_batches=2)) == []


def test_a_ring_sends_all_but_one_part_and_twice_that_in_an_all_reduce() -> None:
    gather = Collective("all_gather", "root", "shard", 8, 800)
    assert gather.sent == 700
    assert replace(gather, kind="reduce_scatter").sent == 700
    assert replace(gather, kind="all_reduce").sent == 1400
    assert replace(gather, ranks=2).sent == 400


def test_sums_are_those_of_the_page() -> None:
    """P entries, all trained: rows that divide by the ranks need no padding."""
    config = replace(SMALL, vocab_size=1024)
    setup = Setup(256, 256, world=8, replicas=2, micro_batches=3)
    moved = collectives(config, setup)

    def handed(kind: str, group: str) -> int:
        return sum(each.size for each in moved if (each.kind, each.group) == (kind, group))

    root = math.prod((2, 1024, 128)) + 128
    total = config.num_parameters
    assert handed("all_gather", "shard") == 3 * 2 * (2 * total - root)
    assert handed("reduce_scatter", "shard") == 3 * 4 * total
    assert handed("all_reduce", "replicate") == 4 * total // 4
    assert handed("all_reduce", "world") == 8 * (4 + 8)
