"""What rejection sampling can be told, one concern a group; docs/rejection.md says where each default comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import check_range
from engine.optim import OptimConfig
from engine.schedule import ScheduleConfig
from engine.sft import SftTrainConfig
from model.errors import InputError
from rlhf.sampling_config import HeldOutPromptsConfig, SamplingConfig, SamplingJobConfig
from rlhf.selection import SelectConfig


@dataclass
class DrawConfig(SamplingConfig):
    """What is sampled in a round. Nothing is ever filtered: the best are chosen afterwards."""

    prompts: int | None = None
    """prompts of a round, others in each until all have had their turn; by default all in every round"""
    samples: int = 8
    """answers a prompt"""
    chunk: int = 4096
    """answers between two writes to disk: what a kill costs at most"""

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        super().check()
        check_range("rollout", self, 1, "prompts", "chunk")


@dataclass
class HeldOutConfig(HeldOutPromptsConfig):
    """Held-out prompts: which, how many, how often."""

    every: int = 1
    """rounds between looks at held-out prompts; 0 looks only before the first and after the last"""


@dataclass
class RejectionConfig(SamplingJobConfig):
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
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(beta2=0.98, weight_decay=1e-4))
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(final_ratio=0.0))
    eval: HeldOutConfig = field(default_factory=HeldOutConfig)

    def reads(self) -> dict[str, str | None]:
        """As in every job, and the judge's."""
        return {**super().reads(), "--reward": self.reward}

    def check(self) -> None:
        """Raises InputError where a value makes no sense by itself."""
        super().check()
        if self.rounds < 1:
            raise InputError(f"--rounds is {self.rounds}. Use 1 or more.")
