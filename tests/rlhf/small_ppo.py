"""Models and prompts small enough for whole iterations in milliseconds, for tests of alignment's roles."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from model.chat import ChatTemplate, resolve_template
from model.config import parameter_shapes
from model.hf import load_config, write_model
from model.init import initial_value
from model.tokenizer import Tokenizer
from rlhf.ppo_config import PpoConfig
from rlhf.prompts import Prompt
from rlhf.trajectory import Sample
from tests.small_base import write_small_base

CONTEXT = 48


def write_small_roles(folder: Path) -> Path:
    """A policy in `folder`/sft and a wider reward model in `folder`/rm, with one tokenizer and template."""
    write_small_base(folder / "sft", CONTEXT)
    tokenizer = Tokenizer.load(folder / "sft")
    template = ChatTemplate.named("chimed", tokenizer)
    template.store(tokenizer).save(folder / "sft")
    policy = load_config(folder / "sft", "lm")
    reward = dataclasses.replace(
        policy, head="score", hidden_size=32, num_heads=4, num_kv_heads=2, score_mean=0.25, score_std=2.0
    )
    weights = ((name, initial_value(reward, name, shape, 1)) for name, shape in parameter_shapes(reward).items())
    write_model(folder / "rm", reward, weights, torch.float32)
    template.store(tokenizer).save(folder / "rm")
    return folder


def small_recipe(folder: Path, **changes: Any) -> PpoConfig:
    """A resolved recipe of those models."""
    config = PpoConfig(model=str(folder / "sft"), out=str(folder / "ppo"))
    config.reward.source = str(folder / "rm")
    config.train = dataclasses.replace(config.train, steps=3, context=CONTEXT, micro_batch_tokens=2 * CONTEXT)
    return dataclasses.replace(config, **changes).with_rates()


def small_tokenizer(folder: Path) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = Tokenizer.load(folder / "sft")
    return tokenizer, resolve_template("auto", tokenizer)


def small_samples(count: int = 7, per_prompt: int = 1) -> tuple[list[Prompt], list[Sample]]:
    """Made-up answers of ragged lengths to made-up prompts; every third did not end."""
    prompts = [Prompt(50 + at, ids(at, 3 + 4 * at % 17), (), {"row": at}) for at in range(count)]
    samples = []
    for number in range(count * per_prompt):
        prompt, answer = prompts[number // per_prompt], ids(number + 31, 1 + 5 * number % 23)
        reason: Any = "length" if number % 3 == 2 else "stop"
        logprobs = [-0.1 * (1 + at) for at in range(len(answer))]
        samples.append(
            Sample(prompt.position, number % per_prompt, prompt.ids, answer, logprobs, reason, number, 0, f"答{number}")
        )
    return prompts, samples


def ids(start: int, length: int) -> list[int]:
    return [3 + (start * 7 + at * 13) % 200 for at in range(length)]
