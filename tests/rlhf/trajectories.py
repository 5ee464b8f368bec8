"""Small trajectories, and models for them, for tests of what is done with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from engine.guard import Guard, GuardConfig
from engine.mesh import ParallelConfig, Runtime
from engine.optim import AdamW, OptimConfig
from engine.shard import Precision, fill, parallelize
from model.batch import PackedBatch
from model.config import ModelConfig, parameter_shapes
from model.heads import CausalLM, ScalarModel, TokenLogprobs
from model.init import initial_value
from rlhf.advantages import gae_advantages, shaped_rewards, whiten
from rlhf.micro_batches import Slice, each_token, micro_batches, minibatches
from rlhf.trajectory import Sample, Trajectory
from rlhf.update import Trained
from tests.model.tiny import LLAMA

END = 2
# One process, without a process group: nothing is asked of its mesh but how many dimensions it has.
ALONE = Runtime(0, 1, torch.device("cpu"), SimpleNamespace(ndim=1))  # type: ignore[arg-type]
SCORED = dataclasses.replace(LLAMA, head="score")


def some_samples(count: int = 12, seed: int = 0, longest: int = 12, answers: int = 2) -> list[Sample]:
    """Random prompts with ragged answers to each; every third is cut, the others end with `END`."""
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        is_cut = number % 3 == 2
        ids = rng.integers(3, LLAMA.vocab_size, rng.integers(1, longest)).tolist()
        ids = ids if is_cut else [*ids, END]
        samples.append(
            Sample(
                prompt=number // answers,
                sample=number % answers,
                prompt_ids=rng.integers(3, LLAMA.vocab_size, rng.integers(1, 9)).tolist(),
                answer_ids=ids,
                logprobs=(-5 * rng.random(len(ids))).astype(np.float32).tolist(),
                end_reason="length" if is_cut else "stop",
                seed=number,
                version=0,
                text="",
            )
        )
    return samples


def made_of(lengths: Sequence[tuple[int, int]], prompts: Sequence[int] | None = None) -> Trajectory:
    """A trajectory of prompts and answers of these lengths, all ended."""
    samples = [
        Sample(number if prompts is None else prompts[number], 0, [5] * p, [7] * a, [-1.0] * a, "stop", 0, 0, "")
        for number, (p, a) in enumerate(lengths)
    ]
    return Trajectory.of(samples, "cpu")


def spans(trajectory: Trajectory) -> list[slice]:
    """Where each sample's actions are."""
    ends = trajectory.bounds[1:]
    starts = trajectory.bounds[:-1] + trajectory.prompt_lengths.numpy()
    return [slice(start - 1, end - 1) for start, end in zip(starts, ends, strict=True)]


def make(config: ModelConfig, runtime: Runtime, seed: int = 0, precision: Precision = "fp32") -> CausalLM | ScalarModel:
    """A model with fresh weights, sharded over the ranks there are."""
    with torch.device("meta"):
        model = CausalLM(config) if config.head == "lm" else ScalarModel(config)
    parallelize(model, runtime, ParallelConfig(), precision, "none")
    shapes = parameter_shapes(config)
    fill(model, ((name, initial_value(config, name, shape, seed)) for name, shape in shapes.items()))
    return model


def trained(model: nn.Module, runtime: Runtime, lr: float = 1e-3) -> Trained:
    optimizer = AdamW(model, OptimConfig(eps=1e-5, weight_decay=0.0, clip=0.0))
    return Trained(model, optimizer, Guard(GuardConfig(), runtime.device), lambda step: lr)


def first_pass(trajectory: Trajectory, count: int, capacity: int, runtime: Runtime, seed: int = 0) -> list[Slice]:
    """The micro-batches of iteration 0's first pass."""
    parts = minibatches(trajectory, count, seed, 0, 0)
    return [own for part in parts for own in micro_batches(trajectory, part, capacity, runtime.rank, runtime.world)]


def read(
    trajectory: Trajectory,
    policy: nn.Module,
    critic: nn.Module | None,
    slices: Sequence[Slice],
    runtime: Runtime,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
) -> Trajectory:
    """With everything that an update wants, the policy being its own reference, and scores of a fixed kind."""
    score = torch.from_numpy(np.random.default_rng(7).standard_normal(trajectory.num_samples)).float()
    old = each_token(trajectory, slices, lambda batch: policy(batch, temperature).logprob, runtime)
    trajectory = trajectory.replace(score=score, old_logprob=old, reference_logprob=old)
    values = torch.zeros_like(old) if critic is None else each_token(trajectory, slices, critic, runtime)
    trajectory = trajectory.replace(values=values, rewards=shaped_rewards(trajectory, kl_coef, "k1"))
    advantages, returns = gae_advantages(trajectory, 1.0, 0.95)
    return trajectory.replace(advantages=whiten(advantages, trajectory.actions), returns=returns)


class Fixed(nn.Module):
    """A policy or critic that says what it is told of each token: a leaf tensor, to look at its gradient."""

    def __init__(self, said: Tensor, entropy: Tensor | None = None) -> None:
        super().__init__()
        self.said = nn.Parameter(said)
        self.entropy = nn.Parameter(torch.zeros_like(said) if entropy is None else entropy)

    def forward(
        self, batch: PackedBatch, temperature: float | None = None, with_entropy: bool = False
    ) -> TokenLogprobs | Tensor:
        if temperature is None:
            return self.said * 1.0
        is_target = batch.targets >= 0
        return TokenLogprobs(self.said * is_target, self.entropy * is_target, torch.zeros_like(self.said))


def one_slice(trajectory: Trajectory) -> Slice:
    """All of it as one micro-batch, with room behind it."""
    (own,) = micro_batches(trajectory, np.arange(trajectory.num_samples), len(trajectory.tokens) + 8)
    return own
