"""A small reward model as a directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from model.chat import ChatTemplate
from model.config import parameter_shapes
from model.hf import load_config, write_model
from model.init import initial_value
from model.tokenizer import Tokenizer
from tests.small_base import write_small_base


def write_small_sft(directory: Path, context: int = 64, template: str = "chimed") -> Path:
    """What tools/sft.py leaves, with fresh weights: a language model, its tokenizer and template."""
    write_small_base(directory, context)
    tokenizer = Tokenizer.load(directory)
    ChatTemplate.named(template, tokenizer).store(tokenizer).save(directory)
    return directory


def write_small_reward_model(
    directory: Path, mean: float | None = None, std: float | None = None, context: int = 64
) -> Path:
    """What tools/rm.py leaves, with fresh weights."""
    write_small_sft(directory, context)
    config = dataclasses.replace(load_config(directory), head="score", score_mean=mean, score_std=std)
    shapes = parameter_shapes(config)
    weights = ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items())
    write_model(directory, config, weights, torch.float32)
    return directory
