"""What rejection sampling can be told, one concern a group; docs/rejection.md says where each default comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import check_range
from engine.job import JobConfig
from engine.loop import EvalConfig
from engine.optim import OptimConfig
from engine.schedule import ScheduleConfig
from engine.sft import ChatConfig, SftTrainConfig
from model.errors import InputError
from rlhf.ppo_config import PromptDataConfig
from rlhf.selection import SelectConfig


@dataclass
class DrawConfig:
    """What is sampled in a round. Nothing is ever filtered: the best are chosen afterwards."""

    prompts: int | None = None
    """prompts of a round, others in each until all have had their turn; by default all in every round"""
    samples: int = 8
    """answers a prompt"""
    temperature: float = 1.0
    """of sampling"""
    max_new_tokens: int = 1024
    """longest answer"""
    rows: int = 64
    """answers that a process decodes at once"""
    cache_gib: float | None = None
    """memory of a process for keys and values; by default a share of what is free"""
    chunk: int = 4096
    """answers between two writes to disk: what a kill costs at most"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("rollout", self, 1, "prompts", "samples", "max_new_tokens", "rows", "chunk")
        check_range("rollout", self, 0.001, "cache_gib")
        if not 0.01 <= self.temperature <= 100:
            raise InputError(
                f"--rollout.temperature is {self.temperature}. Use a value from 0.01 to 100; likeliest tokens alone "
                "are the same answer every time."
            )


@dataclass
class HeldOutConfig(EvalConfig):
    """Held-out prompts: which, how many, how often."""

    every: int = 1
    """rounds between looks at held-out prompts; 0 looks only before the first and after the last"""
    fraction: float = 0.01
    """share of prompts held out, chosen by their hash"""
    data: list[str] = field(default_factory=list)
    """held-out prompt files; instead of a share of the prompts"""
    max_tokens: int = 131_072
    """room for answers at each look: so many tokens over rollout.max_new_tokens is the number of prompts"""


@dataclass
class RejectionConfig(JobConfig):
    """Fine-tune a model on the best of its own answers, judged by a reward model or a function."""

    model: str = "ckpt/sft"
    """policy to start from, such as fine-tuning leaves"""
    out: str = "ckpt/rejection"
    """run directory"""
    seed: int = 0
    """of the choice of prompts, of sampling and of the order of training"""
    reward: str = "ckpt/rm"
    """reward model's directory, or module:function, called with a list of answers and giving a list of numbers"""
    rounds: int = 1
    """times to sample, choose and fine-tune; each samples from the model of the one before"""
    begin: Literal["base", "last"] = "base"
    """weights that each round's fine-tuning begins with: those of --model, or those of the round before"""
    select: SelectConfig = field(default_factory=SelectConfig)
    rollout: DrawConfig = field(default_factory=DrawConfig)
    train: SftTrainConfig = field(default_factory=SftTrainConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5, beta2=0.98, weight_decay=1e-4))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(final_ratio=0.0))
    eval: HeldOutConfig = field(default_factory=HeldOutConfig)
    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)

    def check(self) -> None:
        """Raises InputError where a value makes no sense by itself."""
        super().check()
        if self.rounds < 1:
            raise InputError(f"--rounds is {self.rounds}. Use 1 or more.")
