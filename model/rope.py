"""Rotary frequencies with their scalings, and the tables of cosines and sines that every layer shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.rotary import rotary, split_rotary
from model.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Rotation:
    """The angles of a batch: positions int64 [T], cos and sin fp32 [P, h/2].

    The tables must stay in fp32, so whoever wraps a block must not cast its arguments (`engine.shard` does not).
    """

    positions: Tensor
    cos: Tensor
    sin: Tensor

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q [T, H, h] and k [T, K, h]."""
        return rotary(q, k, self.positions, self.cos, self.sin)

    def split(self, qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values out of their fused product [T, H + 2K, h], the former two rotated."""
        return split_rotary(qkv, heads, kv_heads, self.positions, self.cos, self.sin)


class RotaryTable(nn.Module):
    """Cosines and sines of all positions of a run. No parameters, and nothing in the state dict.

    The tables are a function of the configuration: whatever moves, empties or casts the module, they are made
    again on the new device, in fp32.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        cos, sin = rotary_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTable:
        super()._apply(fn, recurse)
        if not self.cos.is_meta:
            cos, sin = rotary_tables(self.config)
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.cos.device)
        return self

    def forward(self, positions: Tensor) -> Rotation:
        return Rotation(positions, self.cos, self.sin)


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [rope_length, h/2], in the fp32 arithmetic that released models were trained with."""
    frequencies, amplitude = inverse_frequencies(config)
    angles = torch.outer(torch.arange(config.rope_length, dtype=torch.float32), frequencies)
    return angles.cos() * amplitude, angles.sin() * amplitude


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle of one position for each pair of entries, fp32 [h/2], and the factor on cosine and sine."""
    scaling = config.rope_scaling
    plain = _inverse_frequencies(config.head_dim, config.rope_theta)
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "dynamic":
        return _dynamic(config, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(config, scaling, plain), _yarn_amplitude(scaling)
    assert scaling.kind == "llama3", scaling.kind
    return _llama3(config, scaling, plain), 1.0


def _inverse_frequencies(width: int, base: float) -> Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)


def _dynamic(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """The base grows with the context of the run, not with the batch: one document must not turn another."""
    width, original = config.head_dim, config.max_position_embeddings
    stretch = scaling.factor * max(config.rope_length, original) / original - (scaling.factor - 1)
    return _inverse_frequencies(width, config.rope_theta * stretch ** (width / (width - 2)))


def _yarn(config: ModelConfig, scaling: RopeScaling, plain: Tensor) -> Tensor:
    width, original = config.head_dim, scaling.original_max_position_embeddings or config.max_position_embeddings

    def pair_that_turns(times: float) -> float:
        """Index of the pair that turns so many times within the original context."""
        return width * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_that_turns(scaling.beta_fast or 32), pair_that_turns(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _yarn_amplitude(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def _llama3(config: ModelConfig, scaling: RopeScaling, plain: Tensor) -> Tensor:
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None and high is not None
    turns = original * plain / (2 * math.pi)  # within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / scaling.factor + smooth * plain
