"""Our side of the training benchmark: the model, loader, guard, optimizer and step of a run, without its log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from engine.benchmark import free
from engine.data.loader import StepLoader
from engine.fp8 import use_fp8
from engine.guard import Guard, GuardConfig
from engine.memory import MemoryPlan
from engine.mesh import ParallelConfig, Runtime
from engine.optim import AdamW, OptimConfig
from engine.shard import fill, parallelize
from engine.step import Objective, PendingReport, next_token_loss, train_step
from model.config import parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.init import initial_value
from rlhf.reward_model import ranking_objective


class _NamedAdamW(AdamW):
    """Whose operators a profile finds by name, whatever they are."""

    def step(self, lr: Tensor, clip_scale: Tensor, should_skip: Tensor) -> None:
        with record_function("optimizer"):
            super().step(lr, clip_scale, should_skip)


class Ours:
    """Steps as `engine.loop` takes them: fed by the loader, and read one step late.

    Args:
        memory: how much is computed again, in which packs, and with products of how many bits; the loader makes packs
            of that size.
        compile_blocks: by torch.compile.
    """

    def __init__(
        self, memory: MemoryPlan, loader: StepLoader[Any], runtime: Runtime, seed: int, compile_blocks: bool = False
    ) -> None:
        config, setup = memory.config, memory.setup
        with torch.device("meta"):
            model: nn.Module = ScalarModel(config) if config.head == "score" else CausalLM(config)
        if setup.fp8:
            use_fp8(model, runtime.device)
        parallelize(model, runtime, ParallelConfig(), setup.precision, setup.recompute, compile_blocks)
        shapes = parameter_shapes(config)
        fill(model, ((name, initial_value(config, name, shapes[name], seed, runtime.device)) for name in shapes))
        self._model, self._loader, self._runtime = model, loader, runtime
        self._optimizer = _NamedAdamW(model, OptimConfig())
        self._guard = Guard(GuardConfig(), runtime.device)
        self._objective: Objective[Any] = (
            ranking_objective("pairwise", 0.0, 0.0) if config.head == "score" else next_token_loss()
        )
        self._pending: PendingReport | None = None
        extras = (", 8-bit products" if setup.fp8 else "") + (", blocks compiled" if compile_blocks else "")
        self.settings = f"packs of {setup.tokens_per_pack:,}, recompute {setup.recompute}{extras}"

    @property
    def padding_share(self) -> float:
        return self._loader.padding_share

    @property
    def data_wait(self) -> float:
        """Seconds that the last step waited for its data."""
        return self._loader.wait_seconds

    def step(self) -> None:
        """One optimizer step, whose numbers are read in the next one."""
        before = self._pending
        self._pending = train_step(
            self._model,
            self._optimizer,
            self._guard,
            self._objective,
            self._loader.next_step(),
            self._runtime,
            lr=1e-4,
        )
        if before is not None:
            before.read()

    def finish(self) -> float:
        """The last step's loss, in nats a target or pair."""
        assert self._pending is not None
        return self._pending.read().loss

    def close(self) -> None:
        self._loader.close()
        del self._model, self._optimizer, self._pending, self._objective
        free()
