"""A PPO run that is killed at random moments ends as the run that nobody touched, with everything that moves moving."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.loop import CheckpointConfig
from engine.optim import OptimConfig
from engine.shard import Precision
from rlhf.ppo_config import (
    AlgorithmConfig,
    KlConfig,
    LimitsConfig,
    PpoConfig,
    PpoEvalConfig,
    PpoLogConfig,
    PpoTrainConfig,
    PretrainingMixConfig,
    RewardConfig,
    RolloutConfig,
    ValueConfig,
)
from rlhf.ppo_job import train_ppo
from rlhf.sampling_config import PromptDataConfig
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.rlhf.small_reward import write_small_reward_model, write_small_sft
from tests.small_base import write_small_conversations, write_small_data


@pytest.mark.parametrize(("world", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32")])
def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(
    tmp_path: Path, world: int, precision: Precision
) -> None:
    base, reward = write_small_sft(tmp_path / "sft"), write_small_reward_model(tmp_path / "rm", mean=0.2, std=0.5)
    prompts, texts = write_small_conversations(tmp_path / "chats.jsonl", 30), write_small_data(tmp_path / "texts.jsonl")

    def recipe(out: Path) -> PpoConfig:
        return PpoConfig(
            model=str(base),
            out=str(out),
            train=PpoTrainConfig(steps=16, micro_batch_tokens=256, precision=precision),
            optim=OptimConfig(lr=1e-3, eps=1e-5, weight_decay=0.0),
            checkpoint=CheckpointConfig(every=2),
            eval=PpoEvalConfig(every=6, fraction=0.1),
            log=PpoLogConfig(tensorboard=False, curves=False),
            reward=RewardConfig(source=str(reward), normalise=True),
            data=PromptDataConfig(paths=[str(prompts)]),
            rollout=RolloutConfig(prompts=4, samples=2, max_new_tokens=8, keep=world == 2),
            kl=KlConfig(target=0.01, horizon=20),
            ppo=AlgorithmConfig(epochs=2, minibatches=2),
            value=ValueConfig(lr=1e-3, warmup=2),
            ptx=PretrainingMixConfig(coef=0.1, paths=[str(texts)]),
            limits=LimitsConfig(truncated=None),
        )

    check_that_kills_leave_no_trace(train_ppo, recipe, tmp_path, world, kills=3)
