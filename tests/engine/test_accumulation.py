"""Micro-batches of one step: what FSDP gathers and reduces between them, and that its numbers stay the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.guard import Guard, GuardConfig
from engine.memory import Setup, plan
from engine.mesh import ParallelConfig, start
from engine.optim import AdamW, OptimConfig
from engine.shard import Accumulation, Precision, fill, local, parallelize, set_last_micro_batch
from engine.step import next_token_loss, train_step
from model.config import parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from tests.engine.test_memory import SLACK, SMALL, hidden_by_ops, moments_in, sharded, summed_loss, without_optimizer
from tests.engine.test_step import LENGTHS, pack, small_config
from tests.ranks import run_ranks

STEPS = 3


class Counts(TorchDispatchMode):
    """How often each op is called."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def train(precision: Precision, does: Accumulation, replicas: int = 1) -> tuple[list[bytes], Counter[str], bool]:
    """Four micro-batches a step and rank: losses and weights as bytes, what the last step called, and whether nothing
    is gathered behind it."""
    runtime = start(ParallelConfig(replicas=replicas))
    config = small_config(tied=False)
    with torch.device("meta"):
        model = CausalLM(config)
    parallel = ParallelConfig(replicas=replicas, reshard_after_forward=not does.keeps_weights)
    parallelize(model, runtime, parallel, precision, "none")
    assert model.accumulation == Accumulation(does.keeps_weights, runtime.shards == 1)
    model.accumulation = does
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items()))
    optimizer, guard = AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device)
    results = []
    for step in range(STEPS):
        packs = [pack(lengths, 100 * step + 10 * runtime.rank + index) for index, lengths in enumerate(LENGTHS)]
        with Counts() as counts:
            pending = train_step(model, optimizer, guard, next_token_loss(), packs, runtime, lr=0.01)
        results.append(np.float64(pending.read().loss).tobytes())
    are_sharded = all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    results += [local(p).detach().numpy().tobytes() for p in model.parameters()]
    return results, counts.of, are_sharded


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weights_that_stay_gathered_are_gathered_once_a_step_and_change_no_bit(precision: Precision) -> None:
    fresh = run_ranks(train, 2, precision, Accumulation(False, False))
    kept = run_ranks(train, 2, precision, Accumulation(True, False))
    units, micro_batches = 3, len(LENGTHS)  # two blocks and the root
    for (numbers, calls, _), (same, fewer, are_sharded) in zip(fresh, kept, strict=True):
        assert same == numbers and are_sharded
        # The root is gathered once a micro-batch, a block before each of its passes; or all of them once.
        assert calls["c10d::_allgather_base_"] == micro_batches * (2 * units - 1)
        assert fewer["c10d::_allgather_base_"] == units
        assert calls["c10d::_reduce_scatter_base_"] == fewer["c10d::_reduce_scatter_base_"] == micro_batches * units


def test_without_shards_gradients_are_reduced_once_a_step_and_change_no_bit() -> None:
    every = run_ranks(train, 2, "bf16", Accumulation(False, False), 2)
    once = run_ranks(train, 2, "bf16", Accumulation(False, True), 2)
    for (numbers, calls, _), (same, fewer, are_sharded) in zip(every, once, strict=True):
        assert same == numbers and are_sharded
        assert calls["fsdp::chunk_cat"] == 3 * len(LENGTHS)
        assert fewer["fsdp::chunk_cat"] == 3


def test_plan_holds_weights_that_stay_gathered() -> None:
    """In the second micro-batch of three, when all gradients and all weights are there."""
    setup = Setup(512, 256, world=4, reshard_after_forward=False, micro_batches=3)
    with sharded(SMALL, setup) as (model, tokens, live):
        for _ in range(2):
            live.log.clear()
            set_last_micro_batch(model, False)
            (summed_loss(model, tokens, setup) / setup.tokens_per_pack).backward()
        found = moments_in(live, SMALL, setup)
    moments = {moment.name: moment for moment in plan(SMALL, setup).moments}
    for name, total in found.items():
        expected = without_optimizer(moments[name]) - hidden_by_ops(SMALL, setup, moments[name])
        assert expected == pytest.approx(total, rel=SLACK), name
