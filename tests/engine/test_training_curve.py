"""A training step and a short run with the kernels are those that the references describe, up to rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.optim import AdamW, OptimConfig
from engine.shard import fill, parallelize
from engine.step import next_token_loss, train_step
from kernels import backend
from model.batch import IGNORE, PackedBatch
from model.config import PRESETS, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from tests.kernels.faces import DEVICE, TRITON

STEPS = 50
LENGTHS = [16, 13]
CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


def batch(step: int) -> PackedBatch:
    """A pack of documents in which every token follows from the one before it, so that there is much to learn."""
    generator = torch.Generator().manual_seed(step)
    documents = []
    for length in LENGTHS:
        first, stride = torch.randint(1, 4, (2,), generator=generator).tolist()
        documents.append((first + stride * torch.arange(length)) % CONFIG.vocab_size)
    tokens = torch.cat(documents)
    targets = tokens.roll(-1)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    targets[bounds[1:] - 1] = IGNORE
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return PackedBatch(tokens, positions, bounds.int(), targets, len(LENGTHS), 16)


def losses(face: str, dtype: torch.dtype, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The loss of every step, fp64 [STEPS]."""
    monkeypatch.setattr(backend, "FACE", face)
    with torch.device("meta"):
        model = CausalLM(CONFIG)
    parallelize(model, runtime, ParallelConfig(), "fp32", "none")
    model.to(dtype)
    shapes = parameter_shapes(CONFIG)
    fill(model, ((name, initial_value(CONFIG, name, shape, 0)) for name, shape in shapes.items()))
    optimizer, guard = AdamW(model, OptimConfig(z_loss=1e-4)), Guard(GuardConfig(), runtime.device)
    objective = next_token_loss(z_loss=1e-4)
    reports = [
        train_step(model, optimizer, guard, objective, [batch(step)], runtime, lr=0.01).read() for step in range(STEPS)
    ]
    assert not any(report.was_skipped for report in reports)
    return torch.tensor([report.loss for report in reports], dtype=torch.float64)


def gradients(face: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Of the weights in one dtype, all in one row, fp64."""
    monkeypatch.setattr(backend, "FACE", face)
    model = CausalLM(CONFIG).to(DEVICE)
    shapes = parameter_shapes(CONFIG)
    fill(model, ((name, initial_value(CONFIG, name, shape, 0)) for name, shape in shapes.items()))
    model.to(dtype)
    with torch.no_grad():  # what is fresh is too even: attention would hardly matter
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    nll_sum, z_sum = model(batch(0).to(DEVICE), cross_entropy=True, z_loss=1e-4)
    (nll_sum + z_sum).backward()
    found = [parameter.grad for parameter in model.parameters()]
    return torch.cat([grad.double().flatten() for grad in found if grad is not None])


@pytest.mark.parametrize("dtype", [dtype for _, dtype in TRITON], ids=str)
def test_gradients_of_a_model_are_as_good_as_those_of_the_references(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = gradients("reference", torch.float64, monkeypatch)
    plain = gradients("reference", dtype, monkeypatch)
    ours = gradients("triton", dtype, monkeypatch)
    # The weights themselves are rounded once, to the dtype; that is in the error of both.
    assert (ours - truth).norm() <= 2 * (plain - truth).norm()


def test_fifty_steps_with_kernels_are_those_of_the_references(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = losses("reference", torch.float64, runtime, monkeypatch)
    plain = losses("reference", torch.float32, runtime, monkeypatch)
    ours = losses("triton", torch.float32, runtime, monkeypatch)
    assert truth[-1] < 0.5 * truth[0]
    # Rounding errors grow from step to step, in the references as in the kernels.
    allowed = 2 * (plain - truth).abs().cummax(dim=0).values + 4 * torch.finfo(torch.float32).eps * truth
    assert ((ours - truth).abs() <= allowed).all()
