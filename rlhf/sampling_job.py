"""What jobs that sample answers share: a policy's tokenizer and template, prompts, a judge, and the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.building import Base
from engine.job import STORED, StepShape
from engine.sft import read_chat_base
from engine.shard import Precision
from engine.stored_prompts import Prompts, open_prompts
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.errors import InputError
from model.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel, open_reward_model
from rlhf.rollout import Rollout
from rlhf.sampling_config import SamplingJobConfig
from rlhf.scores import names_function


@dataclass(frozen=True)
class SamplingJob:
    """What answers are drawn from and judged by, opened for a run.

    model: configuration of the policy, with the run's context.
    reward: None where scores are a function's.
    """

    config: SamplingJobConfig
    shape: StepShape
    tokenizer: Tokenizer
    template: ChatTemplate
    model: ModelConfig
    reward: RewardModel | None
    prompts: Prompts
    held_out: Prompts

    @property
    def facts(self) -> dict[str, Any]:
        """What a run that goes on must share with its beginning."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "template": f"{self.template.name} ({self.template.fingerprint[:8]})",
            "context": self.shape.context,
        }

    def rollout(self, precision: Precision, keep: bool) -> Rollout:
        """The sampler; see `Rollout`."""
        return Rollout(
            self.model,
            self.tokenizer,
            self.template.end_ids(self.tokenizer),
            seed=self.config.seed,
            dtype=STORED[precision],
            context=self.shape.context,
            rows=self.config.rollout.rows,
            cache_bytes=self.config.rollout.cache_bytes,
            keep=keep,
            lora=self.config.lora.spec(),
        )

    def first_prompt(self) -> str:
        """As the policy reads it."""
        return self.tokenizer.decode(self.prompts.prompt(0).ids)


def open_sampling(
    config: SamplingJobConfig, base: Base, source: str | None, shape: StepShape, directory: Path
) -> SamplingJob:
    """Read what a job needs; prompts are kept below `directory`.

    Args:
        source: of scores, a reward model's directory or a function's name; None where nothing is judged.
    Raises:
        InputError: policy, reward model, template and prompts do not go together; no prompt, or all are held out.
    """
    tokenizer, template, model = read_chat_base(base, config.tokenizer, config.chat)
    reward = None
    if source is not None and not names_function(source):
        reward = open_reward_model(source, tokenizer, template, model.vocab_size)

    def read(paths: list[str]) -> Prompts:
        longest, system = config.rollout.max_new_tokens, config.data.system
        return open_prompts(paths, config.data.keys, template, tokenizer, shape.context, longest, directory, system)

    prompts = read(config.data.paths)
    if config.eval.data:
        held_out = read(config.eval.data)
        prompts = prompts.without(held_out)
    else:
        prompts, held_out = prompts.split(config.eval.fraction)
    if not len(prompts):
        raise InputError(
            f"All prompts are held out by {', '.join(config.eval.data) or 'their hash'}. Give --eval.data other files."
        )
    return SamplingJob(config, shape, tokenizer, template, model.with_context(shape.context), reward, prompts, held_out)
