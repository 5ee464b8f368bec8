"""The training step over ranks: N processes, accumulation and sharding give what one process gives."""

from __future__ import annotations

import dataclasses
import shutil
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.evaluation import held_out_loss, held_out_means
from engine.guard import Guard, GuardConfig
from engine.masters import masters
from engine.mesh import ParallelConfig, start
from engine.optim import AdamW, OptimConfig
from engine.publish import gather_full
from engine.shard import fill, local, parallelize
from engine.step import Loss, next_token_loss, train_step
from model.batch import IGNORE, PackedBatch
from model.config import PRESETS, ModelConfig, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from tests.ranks import run_ranks

LENGTHS = [[9, 4, 3], [1, 15], [16], [2, 2, 5]]
T = 16
STEPS = 5


def small_config(tied: bool) -> ModelConfig:
    """An odd vocabulary and few rows, so that shards are uneven and some ranks own nothing of a norm."""
    return dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=61,
        hidden_size=9,
        intermediate_size=20,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )


def pack(lengths: list[int], seed: int) -> PackedBatch:
    """Documents of these lengths; what is left of T is a tail without targets."""
    tokens = torch.randint(0, 61, (T,), generator=torch.Generator().manual_seed(seed))
    positions, targets = torch.zeros(T, dtype=torch.int64), torch.full((T,), IGNORE)
    ends = np.cumsum([0, *lengths])
    for begin, end in pairwise(ends):
        positions[begin:end] = torch.arange(end - begin)
        targets[begin : end - 1] = tokens[begin + 1 : end]
    bounds = torch.full((9,), T, dtype=torch.int32)
    bounds[: len(ends)] = torch.from_numpy(ends).int()
    return PackedBatch(tokens, positions, bounds, targets, len(lengths), T)


def train(
    tied: bool, replicas: int, precision: str, recompute: str, clip: float, compile_blocks: bool = False
) -> dict[str, Any]:
    """A few steps over four packs a step, shared out over however many ranks there are."""
    runtime = start(ParallelConfig(replicas=replicas))
    config = small_config(tied)
    with torch.device("meta"):
        model = CausalLM(config)
    parallel = ParallelConfig(replicas=replicas)
    parallelize(model, runtime, parallel, precision, recompute, compile_blocks)  # type: ignore[arg-type]
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items()))
    optimizer = AdamW(model, OptimConfig(lr=0.01, clip=clip))
    guard = Guard(GuardConfig(), runtime.device)
    reports, gradients = [], {}
    zero_grad = optimizer.zero_grad

    def keep_gradients() -> None:
        for name in optimizer.parameters:
            gradient = optimizer.gradient(name)
            gradients[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
        zero_grad()

    for step in range(STEPS):
        packs = [pack(lengths, 10 * step + index) for index, lengths in enumerate(LENGTHS)]
        mine = packs[runtime.rank :: runtime.world]
        optimizer.zero_grad = keep_gradients if step == STEPS - 1 else zero_grad  # type: ignore[method-assign]
        pending = train_step(model, optimizer, guard, next_token_loss(1e-3), mine, runtime, lr=0.01 / (1 + step))
        reports.append(pending.read())
    weights = dict(gather_full(masters(model.named_parameters()), everywhere=True))
    return {
        "loss": np.array([report.loss for report in reports]),
        "norm": np.array([report.grad_norm for report in reports]),
        "targets": np.array([report.targets for report in reports]),
        "gradients": {name: value.numpy() for name, value in gradients.items()},
        "weights": {name: value.numpy() for name, value in weights.items()},
        "rows": {name: local(p).numel() for name, p in model.named_parameters()},
    }


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert np.array_equal(one["targets"], other["targets"])
    np.testing.assert_allclose(other["loss"], one["loss"], rtol=tolerance)
    np.testing.assert_allclose(other["norm"], one["norm"], rtol=tolerance)
    for kind in ("gradients", "weights"):
        for name, value in one[kind].items():
            scale = np.abs(value).max()
            np.testing.assert_allclose(other[kind][name], value, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one(world: int, tied: bool) -> None:
    (one,) = run_ranks(train, 1, tied, 1, "fp32", "none", 0.5)
    many = run_ranks(train, world, tied, 1, "fp32", "none", 0.5)
    assert (one["norm"] > 0.5).any(), "the clip must bite for its norm to be tested"
    assert any(rows == 0 for rank in many for rows in rank["rows"].values()) or world == 2
    assert_same(one, many[0], 1e-5)


def test_sharded_replicas_equal_one_process() -> None:
    (one,) = run_ranks(train, 1, False, 1, "fp32", "none", 0.5)
    assert_same(one, run_ranks(train, 4, False, 2, "fp32", "none", 0.5)[0], 1e-5)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_activations_changes_no_bit(recompute: str) -> None:
    (kept,) = run_ranks(train, 1, False, 1, "fp32", "none", 1.0)
    (recomputed,) = run_ranks(train, 1, False, 1, "fp32", recompute, 1.0)
    assert_same(kept, recomputed, 0.0)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize(("world", "replicas", "precision"), [(2, 1, "fp32"), (2, 1, "bf16"), (4, 2, "bf16")])
def test_nor_does_it_with_weights_that_are_gathered_again_before_a_backward(
    world: int, replicas: int, precision: str, recompute: str
) -> None:
    kept = run_ranks(train, world, False, replicas, precision, "none", 1.0)[0]
    assert_same(kept, run_ranks(train, world, False, replicas, precision, recompute, 1.0)[0], 0.0)


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_follows_fp32_and_keeps_fp32_masters(world: int) -> None:
    (exact,) = run_ranks(train, 1, True, 1, "fp32", "none", 1.0)
    half = run_ranks(train, world, True, 1, "bf16", "none", 1.0)[0]
    # bf16 carries 8 bits: a relative rounding of 2^-9 a number.
    np.testing.assert_allclose(half["loss"], exact["loss"], rtol=2**-7)
    assert all(value.dtype == np.float32 for value in half["weights"].values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_recomputing_changes_no_bit_of_gradients_that_products_add_up(tied: bool, recompute: str) -> None:
    (kept,) = run_ranks(train, 1, tied, 1, "bf16", "none", 1.0)
    (recomputed,) = run_ranks(train, 1, tied, 1, "bf16", recompute, 1.0)
    assert_same(kept, recomputed, 0.0)


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_equal_one_in_bf16(world: int) -> None:
    """One process adds gradients up in fp32; with shards each micro-batch's are rounded to bf16 before they are."""
    (one,) = run_ranks(train, 1, False, 1, "bf16", "none", 0.5)
    many = run_ranks(train, world, False, 1, "bf16", "none", 0.5)[0]
    np.testing.assert_allclose(many["loss"], one["loss"], rtol=2**-7)
    # Of equal weights: each number of a sum is off by 2^-9 at most.
    np.testing.assert_allclose(many["norm"][0], one["norm"][0], rtol=2**-8)


def evaluate_then_look(precision: str) -> dict[str, tuple[str, bool]]:
    runtime = start(ParallelConfig())
    config = small_config(False)
    with torch.device("meta"):
        model = CausalLM(config)
    parallelize(model, runtime, ParallelConfig(), precision, "none")  # type: ignore[arg-type]
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items()))
    held_out_loss(model, next_token_loss(), [pack(lengths, 1) for lengths in LENGTHS], runtime)
    return {name: (str(p.dtype), hasattr(p, "full_tensor")) for name, p in model.named_parameters()}


def test_after_an_evaluation_the_parameters_are_the_sharded_masters_again() -> None:
    for rank in run_ranks(evaluate_then_look, 2, "bf16"):
        assert set(rank.values()) == {("torch.float32", True)}


def show_targets(model: nn.Module, batch: PackedBatch) -> Loss:
    """The usual loss; and the targets' squares and cubes, to be shown."""
    targets = batch.targets[batch.targets != IGNORE].float()
    return next_token_loss()(model, batch)._replace(shown=torch.stack([targets.square().sum(), targets.pow(3).sum()]))


def shown_by_a_step_and_by_an_evaluation() -> tuple[list[float], list[float], list[float]]:
    runtime = start(ParallelConfig())
    config = small_config(False)
    with torch.device("meta"):
        model = CausalLM(config)
    parallelize(model, runtime, ParallelConfig(), "fp32", "none")
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items()))
    mine = [pack(lengths, index) for index, lengths in enumerate(LENGTHS)][runtime.rank :: runtime.world]
    held_out = held_out_means(model, show_targets, mine, runtime)
    guard = Guard(GuardConfig(), runtime.device)
    optimizer = AdamW(model, OptimConfig(lr=0.01))
    report = train_step(model, optimizer, guard, show_targets, mine, runtime, lr=0.01, busy_seconds=3.0).read()
    assert report.busy_seconds == [3.0] * runtime.world and report.loss == pytest.approx(held_out[0], rel=1e-6)
    return report.shown, held_out[1:], [report.targets, report.skipped, report.stop_votes]


@pytest.mark.parametrize("world", [1, 4])
def test_what_an_objective_shows_beside_its_loss_is_a_mean_over_the_targets_of_all_ranks(world: int) -> None:
    packs = [pack(lengths, index) for index, lengths in enumerate(LENGTHS)]
    targets = torch.cat([batch.targets[batch.targets != IGNORE] for batch in packs]).double()
    for shown, held_out, others in run_ranks(shown_by_a_step_and_by_an_evaluation, world):
        assert shown == held_out == pytest.approx([float(targets.square().mean()), float(targets.pow(3).mean())])
        assert others == [len(targets), 0, 0]


def train_compiled(precision: str, recompute: str) -> dict[str, Any]:
    torch._dynamo.reset()
    return train(False, 1, precision, recompute, 1.0, compile_blocks=True)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_blocks_train_as_plain_ones(recompute: str) -> None:
    (plain,) = run_ranks(train, 1, False, 1, "fp32", "none", 1.0)
    (compiled,) = run_ranks(train_compiled, 1, "fp32", recompute)
    assert_same(plain, compiled, 1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_in_compiled_blocks_autograd_adds_gradients_up_in_fp32() -> None:
    (plain,) = run_ranks(train, 1, False, 1, "bf16", "none", 1.0)
    (compiled,) = run_ranks(train_compiled, 1, "bf16", "none")
    np.testing.assert_allclose(compiled["loss"], plain["loss"], rtol=2**-7)
    assert all(gradient.dtype == np.float32 for gradient in compiled["gradients"].values())
