"""On a GPU, too, the host never waits inside a step; `tests/engine/test_host_waits.py` says what that means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime
from engine.neftune import neftune
from engine.optim import AdamW, OptimConfig
from engine.recompute import Recompute
from engine.shard import Precision, fill, parallelize
from engine.step import PendingReport, next_token_loss, train_step
from model.batch import PackedBatch
from model.config import PRESETS, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from tests.gpu.test_training_step import random_pack
from tests.gpu.test_training_step import runtime as runtime

pytestmark = pytest.mark.gpu


@contextmanager
def no_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pinned(pack: PackedBatch) -> PackedBatch:
    names = ("tokens", "positions", "cu_seqlens", "targets")
    return replace(pack, **{name: getattr(pack, name).pin_memory() for name in names})


@pytest.mark.parametrize("alpha", [0.0, 5.0], ids=["plain", "noise"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_steps_never_wait_once_tables_are_filled(
    runtime: Runtime, precision: Precision, recompute: Recompute, alpha: float
) -> None:
    config = PRESETS["tiny"]
    with torch.device("meta"):
        model = CausalLM(config)
    parallelize(model, runtime, ParallelConfig(), precision, recompute)
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shapes[name], 0, runtime.device)) for name in shapes))
    optimizer, guard = AdamW(model, OptimConfig()), Guard(GuardConfig(), runtime.device)
    packs = [pinned(random_pack(config, 1024, 256, seed)) for seed in range(2)]
    noise = neftune(alpha, config.hidden_size, 0, torch.float32) if alpha else None
    objective = next_token_loss(1e-4, noise)

    def step() -> PendingReport:
        return train_step(model, optimizer, guard, objective, packs, runtime, lr=1e-3, busy_seconds=0.1)

    for _ in range(2):
        step().read()
    with no_waits():
        reports = [step() for _ in range(3)]
    losses = [report.read().loss for report in reports]  # this waits, and is meant to
    assert losses[-1] < losses[0]
