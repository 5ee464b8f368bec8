"""Alignment on a GPU: memory that rollouts and waiting tensors give back, and how exact decoding in bf16 is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.shard import local
from model.heads import CausalLM
from model.tokenizer import Tokenizer
from rlhf.micro_batches import each_token, micro_batches
from rlhf.prompts import Prompt
from rlhf.roles import moments_of
from rlhf.rollout import Rollout
from rlhf.trajectory import Sample, Trajectory
from tests.model.tiny import LLAMA
from tests.rlhf.small_ppo import small_recipe, write_small_roles
from tests.rlhf.test_roles import Read, make
from tests.rlhf.test_rollout import make_policy

pytestmark = pytest.mark.gpu

# 60 million parameters: weights and cache are many times what the allocator rounds by.
CONFIG = dataclasses.replace(
    LLAMA,
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=16,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=1024,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_roles(tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


def sampled(rollout: Rollout, policy: CausalLM, runtime: Runtime, version: int = 0) -> list[Sample]:
    draw = torch.Generator().manual_seed(0)
    prompts = [Prompt(at, torch.randint(4, 4000, (40 + at,), generator=draw).tolist(), (), {}) for at in range(8)]
    return rollout.collect(policy, prompts, 8, 1.0, 200, version, runtime)


def make_rollout(folder: Path, dtype: torch.dtype, keep: bool = False) -> Rollout:
    tokenizer = Tokenizer.load(folder / "sft")
    return Rollout(
        CONFIG, tokenizer, (5, 6), seed=1, dtype=dtype, context=1024, rows=64, cache_bytes=1 << 30, keep=keep
    )


def test_a_rollout_gives_back_all_that_it_took(folder: Path, runtime: Runtime) -> None:
    policy = make_policy(CONFIG, runtime, precision="bf16")
    rollout = make_rollout(folder, torch.bfloat16)
    sampled(rollout, policy, runtime)  # workspaces of libraries are taken once
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for version in range(1, 4):
        torch.cuda.reset_peak_memory_stats()
        sampled(rollout, policy, runtime, version)
        assert torch.cuda.memory_allocated() == before
        assert torch.cuda.memory_reserved() <= reserved + (64 << 20)
        assert torch.cuda.max_memory_allocated() > before + 2 * CONFIG.num_parameters


def test_answers_do_not_depend_on_whether_memory_was_kept(folder: Path, runtime: Runtime) -> None:
    policy = make_policy(CONFIG, runtime, precision="bf16")
    kept, freed = (make_rollout(folder, torch.bfloat16, keep) for keep in (True, False))
    first = sampled(freed, policy, runtime)
    assert sampled(kept, policy, runtime) == first
    assert sampled(kept, policy, runtime) == sampled(freed, policy, runtime) == first


def test_log_probabilities_of_decoding_are_as_good_as_those_of_training(
    folder: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, exact = (make_policy(CONFIG, runtime, precision=precision) for precision in ("bf16", "fp32"))
    trajectory = Trajectory.of(sampled(make_rollout(folder, torch.bfloat16), policy, runtime), runtime.device)
    slices = micro_batches(trajectory, np.arange(trajectory.num_samples), 4096)
    of_training, in_fp32 = (
        each_token(trajectory, slices, lambda batch, model=model: model(batch, 1.0).logprob, runtime)[
            trajectory.actions
        ]
        for model in (policy, exact)
    )
    decoded = trajectory.sampled_logprob[trajectory.actions]
    with capsys.disabled():
        difference, ratio = (decoded - of_training).abs(), (of_training - decoded).exp()
        far = ((ratio < 0.9) | (ratio > 1.1)).float().mean()
        print(f"\nrollout against training in bf16, {len(ratio):,} tokens: mean |difference| {difference.mean():.2e}")
        print(f"largest {difference.max():.2e}; {far:.2%} of the ratios are outside 0.9 to 1.1")
    assert (decoded - in_fp32).abs().mean() < 2 * (of_training - in_fp32).abs().mean()


def test_log_probabilities_in_fp32_are_those_of_training(folder: Path, runtime: Runtime) -> None:
    policy = make_policy(CONFIG, runtime)
    trajectory = Trajectory.of(sampled(make_rollout(folder, torch.float32), policy, runtime), runtime.device)
    slices = micro_batches(trajectory, np.arange(trajectory.num_samples), 4096)
    of_training = each_token(trajectory, slices, lambda batch: policy(batch, 1.0).logprob, runtime)
    assert (of_training - trajectory.sampled_logprob).abs().max() < 1e-4


def test_roles_that_wait_on_the_host_free_the_gpu_and_come_back_to_the_bit(folder: Path, runtime: Runtime) -> None:
    stay, wait = small_recipe(folder), small_recipe(folder)
    wait.kl = dataclasses.replace(wait.kl, offload=True)
    wait.rollout = dataclasses.replace(wait.rollout, offload_moments=True)
    read = Read(runtime)
    expected = make(folder, runtime, stay, "bf16")
    found = make(folder, runtime, wait, "bf16")
    assert expected.reference is not None and found.reference is not None and found.moments is not None
    with expected.reference.at_work() as model:
        logprob = read.logprob(model)
    at_rest = torch.cuda.memory_allocated()
    with found.reference.at_work() as model:
        assert torch.equal(read.logprob(model), logprob)
        assert torch.cuda.memory_allocated() > at_rest
    assert torch.cuda.memory_allocated() == at_rest
    moments = list(moments_of(found.policy, found.critic))
    for moment in moments:
        local(moment).normal_()
    before = [local(moment).clone() for moment in moments]
    there = torch.cuda.memory_allocated()
    with found.moments_on_host():
        assert torch.cuda.memory_allocated() <= there - sum(moment.nbytes for moment in before)
        assert all(piece.is_pinned() for piece in found.moments._pieces)
    assert torch.cuda.memory_allocated() == there
    assert all(torch.equal(local(moment), old) for moment, old in zip(moments, before, strict=True))
