"""What every job that samples answers can be told: which prompts, which are held out, how answers are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import check_range
from engine.job import JobConfig
from engine.loop import EvalConfig
from engine.sft import ChatConfig
from model.errors import InputError

GIB = 2**30


@dataclass
class PromptDataConfig:
    """Where prompts come from: any file of questions, conversations or preferences."""

    paths: list[str] = field(default_factory=list)
    """files, directories or glob patterns; a conversation's last answer is left out"""
    keys: dict[str, str] = field(default_factory=dict)
    """what fields mean where the schema is not known by itself: user=ask; see docs/data.md"""
    system: str | None = None
    """system message of prompts that have none"""


@dataclass
class HeldOutPromptsConfig(EvalConfig):
    """Held-out prompts: which, how many, how often."""

    fraction: float = 0.01
    """share of prompts held out, chosen by their hash"""
    data: list[str] = field(default_factory=list)
    """held-out prompt files; instead of a share of the prompts"""
    max_tokens: int = 131_072
    """room for answers at each look: so many tokens over rollout.max_new_tokens is the number of prompts"""


@dataclass
class SamplingConfig:
    """How answers are drawn. Nothing is ever filtered: ratios would be wrong, and the best are chosen afterwards."""

    samples: int = 1
    """answers a prompt"""
    temperature: float = 1.0
    """of sampling"""
    max_new_tokens: int = 1024
    """longest answer"""
    rows: int = 64
    """answers that a process decodes at once"""
    cache_gib: float | None = None
    """memory of a process for keys and values; by default a share of what is free"""

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gib is None else int(self.cache_gib * GIB)

    def check(self) -> None:
        """Raises InputError where a number makes no sense."""
        check_range("rollout", self, 1, "samples", "max_new_tokens", "rows")
        check_range("rollout", self, 0.001, "cache_gib")
        if not 0.01 <= self.temperature <= 100:
            raise InputError(
                f"--rollout.temperature is {self.temperature}. Use a value from 0.01 to 100; likeliest tokens alone "
                "are the same answer every time."
            )


@dataclass
class SamplingJobConfig(JobConfig):
    """What is common to them beside what is common to all jobs."""

    eval: HeldOutPromptsConfig = field(default_factory=HeldOutPromptsConfig)
    data: PromptDataConfig = field(default_factory=PromptDataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
