"""The host puts a step on the queue and never waits inside it: see `tests.no_values`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.loader import packed_batch
from engine.recompute import Recompute
from engine.shard import Precision
from engine.step import next_token_loss
from model.batch import PackedBatch
from model.heads import CausalLM
from model.lora import LoraSpec, add_lora
from tests.model.tiny import CONFIGS, LLAMA
from tests.no_values import DEVICE, HostWaits, make, step, watched


def packs(count: int = 2) -> list[PackedBatch]:
    """As a loader makes them: pinned, on the host."""
    tokens = np.arange(32)
    return [packed_batch(tokens, np.roll(tokens, -1), [9, 14, 5], 8, 16, index) for index in range(count)]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["llama", "tied", "mistral", "qwen2", "qwen3"])
def test_a_step_never_waits_for_the_device(
    name: str, recompute: Recompute, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as watch:
        trained = make(CausalLM, CONFIGS[name], recompute, precision)
        objective = next_token_loss(z_loss=1e-4)
        step(trained, objective, packs())  # the first fills tables that are kept
        with watch():
            step(trained, objective, packs())


def test_targets_with_weights_are_read_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as watch:
        trained = make(CausalLM, LLAMA)
        batches = [replace(pack, weights=torch.ones(32).pin_memory()) for pack in packs()]
        step(trained, next_token_loss(), batches)
        with watch():
            step(trained, next_token_loss(), batches)


def test_adapters_are_trained_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_adapters(config: Any) -> CausalLM:
        model = CausalLM(config)
        add_lora(model, LoraSpec(4, 8.0))
        return model

    with watched(monkeypatch) as watch:
        trained = make(with_adapters, LLAMA)  # type: ignore[arg-type]
        step(trained, next_token_loss(), packs())
        with watch():
            step(trained, next_token_loss(), packs())


def test_batches_that_are_not_pinned_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with watched(monkeypatch) as watch:
        trained = make(CausalLM, LLAMA)
        own = [replace(pack, tokens=pack.tokens.clone()) for pack in packs()]
        step(trained, next_token_loss(), own)
        with watch(), pytest.raises(HostWaits, match="not pinned"):
            step(trained, next_token_loss(), own)


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "cpu": lambda x: x.cpu(),
    "to the host": lambda x: x.to("cpu", non_blocking=True),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "index of booleans": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeats of a tensor": lambda x: x.repeat_interleave(x.long()),
    "assigned number": lambda x: x.__setitem__(1, 2.0),
    "assigned number of the host": lambda x: x.__setitem__(1, torch.tensor(2.0)),
    "index of a list": lambda x: x[[0, 2]],
    "index of the host": lambda x: x[torch.tensor([0, 2])],
    "tensor": lambda x: torch.tensor(2.0, device=x.device),
    "as_tensor": lambda x: torch.as_tensor(np.ones(2), device=x.device),
    "to the device": lambda x: torch.ones(2).to(x.device),
    "to the device, not pinned": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "to the device, blocking": lambda x: torch.ones(2).pin_memory().to(x.device),
    "copied in": lambda x: x[:2].copy_(torch.ones(2)),
}


@pytest.mark.parametrize("name", WAITS)
def test_everything_that_waits_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step: where the objective does it."""

    def objective(model: Any, batch: PackedBatch) -> Any:
        loss = next_token_loss()(model, batch)
        WAITS[name](torch.zeros(4, device=DEVICE))
        return loss

    with watched(monkeypatch) as watch:
        trained = make(CausalLM, LLAMA)
        step(trained, next_token_loss(), packs())
        with watch(), pytest.raises((HostWaits, RuntimeError, NotImplementedError, TypeError)):
            step(trained, objective, packs())


def test_the_backward_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def objective(model: Any, batch: PackedBatch) -> Any:
        loss = next_token_loss()(model, batch)
        loss.total.register_hook(lambda grad: torch.tensor(2.0, device=grad.device))
        return loss

    with watched(monkeypatch) as watch:
        trained = make(CausalLM, LLAMA)
        with watch(), pytest.raises(HostWaits):
            step(trained, objective, packs())
