"""Rollouts: the same answers on any number of ranks, as they were drawn, by the policy as it is now."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.mesh import ParallelConfig, Runtime, start, stop
from engine.publish import gather_full
from engine.shard import Precision, fill, local, parallelize
from model.batch import Layout
from model.config import ModelConfig, parameter_shapes
from model.errors import InputError
from model.generate import Completion, Generator, Request
from model.heads import CausalLM
from model.init import initial_value
from model.kv_cache import page_bytes
from model.sampling import TokenChooser
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


def make_policy(config: ModelConfig, runtime: Runtime, seed: int = 0, precision: Precision = "fp32") -> CausalLM:
    with torch.device("meta"):
        policy = CausalLM(config)
    parallelize(policy, runtime, ParallelConfig(), precision, "none")
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


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    yield start(ParallelConfig())
    stop()


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return Tokenizer.load(base)


@pytest.fixture(scope="module")
def policy(tokenizer: Tokenizer, runtime: Runtime) -> CausalLM:
    return make_policy(lively(tokenizer), runtime)


def drawn(
    policy: CausalLM, rollout: Rollout, prompts: list[Prompt], runtime: Runtime, version: int = 0, **how: Any
) -> list[Sample]:
    """A rollout, by default of three answers each."""
    samples, temperature = how.pop("samples", 3), how.pop("temperature", 0.8)
    return rollout.collect(policy, prompts, samples, temperature, how.pop("new", NEW), version, runtime, **how)


def test_samples_come_by_prompt_and_number(alone: list[dict[str, Any]]) -> None:
    assert [(sample["prompt"], sample["sample"]) for sample in alone] == [
        (100 + at, sample) for at in range(5) for sample in range(3)
    ]
    ends = {sample["end_reason"] for sample in alone}
    assert ends == {"stop", "length"}


def test_ids_are_those_that_the_sampler_drew_and_no_end_is_invented(
    policy: CausalLM, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    drawn_ids: dict[int, list[int]] = {}

    def watch(self: TokenChooser, logits: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seeds = self._seed_and_step[0, rows].tolist()
        tokens, logprobs = choose(self, logits, rows)
        for seed, token in zip(seeds, tokens.tolist(), strict=True):
            drawn_ids.setdefault(seed, []).append(token)
        return tokens, logprobs

    choose = TokenChooser.choose
    with patch.object(TokenChooser, "choose", watch):
        rollout = make_rollout(tokenizer)
        samples = drawn(policy, rollout, make_prompts(), runtime)
    assert sorted(rollout.seconds) == ["exchange", "generation", "weights"]
    assert {sample.end_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert sample.answer_ids == drawn_ids[sample.seed]
        is_end = [token in rollout._stop_ids for token in sample.answer_ids]
        assert is_end == [False] * (len(is_end) - 1) + [sample.end_reason == "stop"]
        assert sample.end_reason == "stop" or len(sample.answer_ids) == NEW
        text = sample.answer_ids[:-1] if sample.end_reason == "stop" else sample.answer_ids
        assert sample.text == tokenizer.decode(text, skip_special=True)


def test_logprobs_are_those_of_the_training_forward_at_the_same_temperature(
    policy: CausalLM, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    trajectory = Trajectory.of(drawn(policy, make_rollout(tokenizer), make_prompts(), runtime), "cpu")
    slices = micro_batches(trajectory, np.arange(trajectory.num_samples), 4 * CONTEXT)

    def of_training(temperature: float) -> Tensor:
        return each_token(trajectory, slices, lambda batch: policy(batch, temperature).logprob, runtime)

    difference = (of_training(0.8) - trajectory.sampled_logprob).abs()
    assert difference.max() < 1e-5
    assert (of_training(1.0) - trajectory.sampled_logprob).abs().max() > 0.1


def test_tokens_are_as_frequent_as_their_probabilities_say(
    policy: CausalLM, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    rollout = make_rollout(tokenizer, rows=500)
    draws = 5000
    samples = drawn(policy, rollout, make_prompts(1), runtime, samples=draws, new=1)
    ids = torch.tensor(samples[0].prompt_ids)
    hidden = policy.model(ids, torch.arange(len(ids)), Layout(*[torch.tensor([0, len(ids)]).int()] * 2, *[CONTEXT] * 2))
    expected = draws * (hidden[-1] @ policy.head_weight.t() / 0.8).softmax(0).double()
    found = torch.bincount(torch.tensor([sample.answer_ids[0] for sample in samples]), minlength=len(expected))
    often = expected >= 5
    assert often.sum() > 50
    expected = torch.cat([expected[often], expected[~often].sum().view(1)])
    found = torch.cat([found[often], found[~often].sum().view(1)])
    chi_square = ((found - expected) ** 2 / expected).sum().item()
    freedom = len(expected) - 1
    # Wilson & Hilferty 1931: its cube root is nearly normal. Four deviations.
    assert abs((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) < 4 * (2 / (9 * freedom)) ** 0.5


def test_a_sample_does_not_depend_on_what_is_generated_beside_it(
    policy: CausalLM, tokenizer: Tokenizer, runtime: Runtime, alone: list[dict[str, Any]]
) -> None:
    one_by_one = drawn(policy, make_rollout(tokenizer, rows=1), make_prompts(), runtime)
    assert_alike([asdict(sample) for sample in one_by_one], alone)
    third = drawn(policy, make_rollout(tokenizer), make_prompts()[2:3], runtime, samples=2)
    assert_alike([asdict(sample) for sample in third], alone[6:8])


def test_samples_of_a_prompt_and_of_another_seed_differ(
    policy: CausalLM, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    rollout = make_rollout(tokenizer)
    same_prompt = [Prompt(at, make_prompts()[0].ids, (), {}) for at in range(4)]
    samples = drawn(policy, rollout, same_prompt, runtime, samples=4)
    others = drawn(policy, rollout, same_prompt, runtime, samples=4, seed=8)
    answers = [tuple(sample.answer_ids) for sample in samples + others]
    assert len({sample.seed for sample in samples + others}) == 32
    assert len(set(answers)) > 28  # an end drawn at once makes two alike


def test_memory_is_free_between_rollouts_unless_it_is_kept(
    policy: CausalLM, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    for keep in (False, True):
        rollout = make_rollout(tokenizer, keep=keep)
        held: list[weakref.ref] = []
        with patch.object(Generator, "generate", holding(held)):
            before = drawn(policy, rollout, make_prompts(), runtime)
        gc.collect()
        assert len(held) == len(list(policy.parameters())) + 2
        assert [ref() is None for ref in held] == [not keep] * len(held)
        assert drawn(policy, rollout, make_prompts(), runtime) == before
        if keep:
            rollout.release()
            gc.collect()
            assert all(ref() is None for ref in held)


def holding(refs: list[weakref.ref]) -> Any:
    """`Generator.generate`, with references to the weights and the cache noted."""
    generate = Generator.generate

    def noting(self: Generator, requests: Sequence[Request], *beat: Any) -> list[Completion]:
        refs.extend(
            weakref.ref(tensor) for tensor in (*self.model.parameters(), self.cache.data, self._decoder._latest)
        )
        return generate(self, requests, *beat)

    return noting


@pytest.mark.parametrize("keep", [False, True])
def test_a_rollout_is_by_the_weights_of_now_and_kept_ones_are_not_gathered_twice(
    keep: bool, tokenizer: Tokenizer, runtime: Runtime
) -> None:
    policy, rollout = make_policy(lively(tokenizer), runtime), make_rollout(tokenizer, keep=keep)
    first = drawn(policy, rollout, make_prompts(), runtime, version=3)
    with patch("rlhf.rollout.gather_full", wraps=gather_full) as gather:
        assert drawn(policy, rollout, make_prompts(), runtime, version=3) == first
        assert gather.called is not keep
    with torch.no_grad():
        policy.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    moved = drawn(policy, rollout, make_prompts(), runtime, version=4)
    assert [sample.logprobs for sample in moved] != [sample.logprobs for sample in first]
    assert {sample.version for sample in moved} == {4}
    fresh = drawn(policy, make_rollout(tokenizer), make_prompts(), runtime, version=4)
    assert fresh == moved


def test_the_generator_computes_in_the_compute_dtype(tokenizer: Tokenizer, runtime: Runtime) -> None:
    policy = make_policy(lively(tokenizer), runtime, precision="bf16")
    rollout = make_rollout(tokenizer, dtype=torch.bfloat16, keep=True)
    samples = drawn(policy, rollout, make_prompts(), runtime)
    assert rollout.generator is not None and rollout.generator.cache.data.dtype == torch.bfloat16
    weights = dict(rollout.generator.model.named_parameters())
    for name, master in policy.named_parameters():
        assert torch.equal(weights[name], local(master).to(torch.bfloat16))
    trajectory = Trajectory.of(samples, "cpu")
    slices = micro_batches(trajectory, np.arange(len(samples)), 4 * CONTEXT)
    exact = make_policy(lively(tokenizer), runtime)
    of_training, in_fp32 = (
        each_token(trajectory, slices, lambda batch, model=model: model(batch, 0.8).logprob, runtime)
        for model in (policy, exact)
    )
    error, of_same_dtype = ((x - in_fp32).abs().mean() for x in (trajectory.sampled_logprob, of_training))
    assert 0 < error < 2 * of_same_dtype


def test_a_cache_that_does_not_hold_one_answer_is_refused_before_anything_is_gathered(tokenizer: Tokenizer) -> None:
    needed = 2 * page_bytes(lively(tokenizer), torch.float32)  # one page of 64 tokens, and one that is nobody's
    make_rollout(tokenizer, cache_bytes=needed)
    with pytest.raises(
        InputError, match=r"--rollout.cache_gib \S+ does not hold an answer .*, 48 tokens. Use at least 0.001"
    ):
        make_rollout(tokenizer, cache_bytes=needed - 1)
