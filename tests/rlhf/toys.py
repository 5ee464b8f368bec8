"""Problems that a small transformer learns in seconds by the real loop: prompts of ids, and a reward on ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.building import Base
from engine.loggers import read_rows
from engine.loop import CheckpointConfig
from engine.mesh import Runtime
from model.batch import PackedBatch
from model.config import ModelConfig
from rlhf.learner import Learner
from rlhf.ppo import ppo
from rlhf.ppo_config import LimitsConfig, PpoConfig, PpoLogConfig, PpoTrainConfig
from rlhf.prompts import Prompt
from rlhf.roles import Roles, make_roles
from rlhf.rollout import Rollout
from rlhf.scores import Scorer
from rlhf.session import Session
from rlhf.trajectory import Sample, Trajectory

END = 0
ONE = Runtime(0, 1, torch.device("cpu"), torch.zeros(0))  # type: ignore[arg-type]


def small_model(vocab_size: int, context: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=context,
    )


class _Stream:
    """The same few prompts in turn."""

    def __init__(self, prompts: Sequence[list[int]]) -> None:
        self._prompts, self._position = prompts, 0

    @property
    def cursor(self) -> dict[str, Any]:
        return {"position": self._position}

    def next(self, count: int) -> list[Prompt]:
        first = self._position
        self._position += count
        return [Prompt(at, self._prompts[at % len(self._prompts)], (), {}) for at in range(first, first + count)]


class _NoWords:
    """A tokenizer that nobody needs."""

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        return " ".join(map(str, ids))


class Rows(list[dict[str, Any]]):
    """Of metrics.jsonl."""

    def of(self, name: str) -> list[float]:
        return [row[name] for row in self]


@dataclasses.dataclass
class Toy:
    """A problem, and what was learnt of it."""

    roles: Roles
    learner: Learner
    session: Session

    @property
    def policy(self) -> Any:
        return self.roles.policy.model

    @property
    def reference(self) -> Any:
        assert self.roles.reference is not None
        return self.roles.reference.model

    def run(self) -> Rows:
        """The whole loop."""
        ppo(self.learner, self.session)
        return Rows(read_rows(self.session.directory / "metrics.jsonl"))


def toy(
    folder: Path,
    model: ModelConfig,
    prompts: Sequence[list[int]],
    score: Callable[[list[int]], float],
    iterations: int,
    stop_ids: Sequence[int] = (),
    contrast: float = 1.0,
    **groups: Any,
) -> Toy:
    """A problem in a folder.

    Args:
        score: of an answer's ids.
        contrast: multiplies the head, so that the reference has preferences.
        groups: of options, by name; what is not given is the job's default, without limits.
    """
    config = PpoConfig(
        out=str(folder),
        train=PpoTrainConfig(steps=iterations, context=model.max_position_embeddings, micro_batch_tokens=4096),
        checkpoint=CheckpointConfig(every=0),
        log=PpoLogConfig(tensorboard=False, curves=False, samples=0, every=1000),
        **{"limits": LimitsConfig(kl=None, entropy=None, truncated=None), **groups},
    ).with_rates()
    config.check()

    def judge(prompts: Sequence[Prompt], samples: Sequence[Sample], trajectory: Trajectory, runtime: Runtime) -> Tensor:
        return torch.tensor([score(sample.answer_ids) for sample in samples])

    fresh: Any = None  # neither tokenizer nor template is asked for
    roles = make_roles(config, Base(model, None), model, fresh, fresh, None, "fp32", ONE)
    with torch.no_grad():
        roles.policy.model.head_weight.mul_(contrast)
        if roles.reference is not None:
            roles.reference.model.head_weight.mul_(contrast)
    words: Any = _NoWords()
    rollout = Rollout(
        model, words, stop_ids, seed=config.seed, dtype=torch.float32, context=model.max_position_embeddings, rows=512,
        keep=True,
    )  # fmt: skip
    scorer = Scorer(judge, config.reward.clip or 0.0, config.reward.missing_end_penalty, config.reward.normalise)
    stream: Any = lambda cursor: _Stream(prompts)  # noqa: E731
    learner = Learner(config, ONE, roles, rollout, scorer, (), stream)
    folder.mkdir(parents=True, exist_ok=True)
    return Toy(roles, learner, Session(learner, config, {}, lambda directory, step: None))


@torch.no_grad()
def next_probabilities(model: Any, prompt: list[int], vocab_size: int, temperature: float = 1.0) -> Tensor:
    """The exact distribution of the next token, fp64 [V]: V documents that differ in it."""
    length = len(prompt) + 1
    tokens = torch.tensor([[*prompt, token] for token in range(vocab_size)]).flatten()
    targets = torch.full_like(tokens, -100).view(vocab_size, length)
    targets[:, -2] = torch.arange(vocab_size)
    batch = PackedBatch(
        tokens,
        torch.arange(length).repeat(vocab_size),
        torch.arange(0, vocab_size * length + 1, length, dtype=torch.int32),
        targets.flatten(),
        vocab_size,
        length,
    )
    return model(batch, temperature).logprob.view(vocab_size, length)[:, -2].double().exp()
