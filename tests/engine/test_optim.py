"""The optimizer over a model: what decays, what is counted, and how often the device is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.optim import AdamW, OptimConfig
from kernels.backend import Chip, observed_launches

LR = 2.0**-4


def model_with_gradients(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Embedding(4, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.full_like(parameter, value)
    return model


def scalar(value: float) -> Tensor:
    return torch.tensor(value)


def test_matrices_decay_and_nothing_else_does() -> None:
    model = model_with_gradients(0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    AdamW(model, OptimConfig(weight_decay=0.5)).step(scalar(LR), scalar(1.0), scalar(0.0))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] * (1 - 0.5 * LR * (parameter.ndim > 1))), name


def test_only_updates_that_are_made_are_counted() -> None:
    optimizer = AdamW(model_with_gradients(1.0), OptimConfig())
    for should_skip in (1.0, 0.0, 1.0, 0.0, 0.0):
        optimizer.step(scalar(LR), scalar(1.0), scalar(should_skip))
    assert optimizer.updates == 3


def test_all_parameters_are_updated_in_one_launch() -> None:
    optimizer = AdamW(model_with_gradients(1.0), OptimConfig())
    launched = []
    with observed_launches(lambda kernel, *_: launched.append(kernel), Chip(90, 132)):
        optimizer.step(scalar(LR), scalar(1.0), scalar(0.0))
    assert len(launched) == 1
