"""Rollouts: the same answers on any number of ranks, as they were drawn, by the policy as it is, in memory given back."""

from __future__ import annotations

import gc
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.mesh import ParallelConfig, Runtime, start
from engine.shard import fill, parallelize
from model.config import ModelConfig, parameter_shapes
from model.heads import CausalLM
from model.init import initial_value
from model.tokenizer import Tokenizer
from rlhf.micro_batches import each_token, micro_batches
from rlhf.prompts import Prompt
from rlhf.rollout import Rollout
from rlhf.trajectory import Sample, Trajectory
from tests.ranks import run_ranks
from tests.small_base import small_config, write_small_base

CONTEXT, NEW = 48, 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_base(tmp_path_factory.mktemp("rollout") / "base", CONTEXT)


def lively(tokenizer: Tokenizer) -> ModelConfig:
    """A model whose next token depends on what was before."""
    return replace(small_config(tokenizer.padded_vocab_size, CONTEXT), initializer_range=0.3)


def make_policy(config: ModelConfig, runtime: Runtime, seed: int = 0) -> CausalLM:
    with torch.device("meta"):
        policy = CausalLM(config)
    parallelize(policy, runtime, ParallelConfig(), "fp32", "none")
    shapes = parameter_shapes(config)
    fill(policy, ((name, initial_value(config, name, shape, seed)) for name, shape in shapes.items()))
    return policy


def make_prompts(count: int = 5) -> list[Prompt]:
    return [Prompt(100 + at, [3 + (at + step) % 90 for step in range(4 + 3 * at)], (), {}) for at in range(count)]


def make_rollout(tokenizer: Tokenizer, **changes: Any) -> Rollout:
    # One token in twenty ends an answer, so that some do and some are cut.
    stops = range(5, tokenizer.padded_vocab_size, 20)
    options: dict[str, Any] = {"seed": 7, "dtype": torch.float32, "context": CONTEXT, "rows": 4, **changes}
    return Rollout(lively(tokenizer), tokenizer, stops, **options)


def collect(directory: Path, prompts: int = 5, samples: int = 3) -> list[dict[str, Any]]:
    """A rollout by a policy that is sharded over the ranks there are."""
    runtime = start(ParallelConfig())
    tokenizer = Tokenizer.load(directory)
    policy = make_policy(lively(tokenizer), runtime)
    found = make_rollout(tokenizer).collect(policy, make_prompts(prompts), samples, 0.8, NEW, 0, runtime)
    return [asdict(sample) for sample in found]


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal but for the rounding of log-probabilities, which depends on how many rows are decoded together."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.pop("logprobs"), other["logprobs"], atol=1e-5)
        assert one == {name: value for name, value in other.items() if name != "logprobs"}


@pytest.fixture(scope="module")
def alone(base: Path) -> list[dict[str, Any]]:
    (found,) = run_ranks(collect, 1, base)
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_samples_do_not_depend_on_the_number_of_ranks(base: Path, alone: list[dict[str, Any]], world: int) -> None:
    first, *others = run_ranks(collect, world, base)
    assert all(other == first for other in others)  # to the bit
    assert_alike(first, alone)


def test_samples_come_by_prompt_and_number(alone: list[dict[str, Any]]) -> None:
    assert [(sample["prompt"], sample["sample"]) for sample in alone] == [
        (100 + at, sample) for at in range(5) for sample in range(3)
    ]
    ends = {sample["end_reason"] for sample in alone}
    assert ends == {"stop", "length"}
