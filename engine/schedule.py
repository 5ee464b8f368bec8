"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.config import check_range
from model.errors import InputError


@dataclass
class ScheduleConfig:
    """How the learning rate moves."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: warm up, stay, then decay over the last `decay_ratio` of the run"""
    warmup_ratio: float = 0.01
    """share of all steps that warms up linearly from 0"""
    warmup_steps: int | None = None
    """steps of warm-up; overrides warmup_ratio"""
    decay_ratio: float = 0.2
    """wsd: share of all steps in the final decay"""
    final_ratio: float = 0.1
    """learning rate at the end, as a share of the peak"""

    def check(self) -> None:
        """Raises InputError where a ratio is not one."""
        for name in ("warmup_ratio", "decay_ratio", "final_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--schedule.{name} is {getattr(self, name)}. Use a share between 0 and 1.")
        check_range("schedule", self, 0, "warmup_steps")


def learning_rate(step: int, steps: int, peak: float, config: ScheduleConfig) -> float:
    """Learning rate of step `step` (from 0) in a run of `steps`.

    Warm-up ends at the peak; the last step lies one decay interval before `final_ratio * peak`, so no step
    runs at a rate of 0. Cosine: Loshchilov & Hutter 2017, eq. 5. WSD: Hu et al. 2024 (MiniCPM), linear decay.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.kind == "constant":
        return peak
    decay_from = max(warmup, round(steps * (1 - config.decay_ratio))) if config.kind == "wsd" else warmup
    progress = min(max(0.0, (step - decay_from) / max(1, steps - decay_from)), 1.0)
    if config.kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = 1 - progress
    return peak * (config.final_ratio + (1 - config.final_ratio) * shape)
