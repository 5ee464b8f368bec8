"""Small models for tests: ours with initial weights, transformers' with random ones, and batches for both."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.batch import IGNORE, PackedBatch
from model.config import ModelConfig, RopeScaling
from model.heads import CausalLM
from model.hf import load_config, read_model
from model.init import initial_value

LLAMA = ModelConfig(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    max_position_embeddings=64,
)

# One of each kind that loads: architectures, then rotary scalings.
CONFIGS: dict[str, ModelConfig] = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_word_embeddings=True),
    "mistral": replace(LLAMA, model_type="mistral", sliding_window=7),
    "qwen2": replace(LLAMA, model_type="qwen2", attention_bias=True, tie_word_embeddings=True),
    "qwen2 with a window": replace(
        LLAMA, model_type="qwen2", attention_bias=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": replace(LLAMA, model_type="qwen3", qk_norm=True, head_dim=16),
    "linear": replace(LLAMA, rope_scaling=RopeScaling("linear", 2.0), rope_theta=500.0),
    "dynamic": replace(LLAMA, rope_scaling=RopeScaling("dynamic", 2.0), rope_theta=500.0),
    "yarn": replace(LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 16), rope_theta=500.0),
    # Ramps over several pairs: from 0 to 3 when truncated, to 2.5 when not.
    "yarn with mscale": replace(
        LLAMA,
        rope_theta=50.0,
        rope_scaling=RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=1.1),
    ),
    "yarn with a factor": replace(
        LLAMA,
        rope_theta=50.0,
        rope_scaling=RopeScaling("yarn", 4.0, 16, beta_fast=4.0, beta_slow=0.5, truncate=False, attention_factor=1.3),
    ),
    "llama3": replace(LLAMA, rope_theta=500.0, rope_scaling=RopeScaling("llama3", 8.0, 16, 1.0, 4.0)),
}


def fill(model: nn.Module, config: ModelConfig, seed: int = 0) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(config, name, tuple(parameter.shape), seed))


def causal_lm(config: ModelConfig, seed: int = 0) -> CausalLM:
    model = CausalLM(config)
    fill(model, config, seed)
    return model


def loaded(directory: Path) -> CausalLM:
    """The model of a directory."""
    config = load_config(directory)
    model = CausalLM(config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in read_model(directory, config):
            parameters.pop(name).copy_(tensor)
    assert not parameters
    return model


def transformers_model(directory: Path, seed: int = 0) -> Any:
    """transformers' model of a directory's config.json, in eager attention, with random weights in every parameter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def reopened(directory: Path) -> Any:
    """transformers' model of a whole directory."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()


def batch(lengths: Sequence[int], vocab: int = 131, seed: int = 3, max_seqlen: int = 64) -> PackedBatch:
    """Random documents of these lengths; every token but a document's last has the next one as its target."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    ends = torch.tensor(lengths).cumsum(0)
    targets = tokens.roll(-1)
    targets[ends - 1] = IGNORE
    return PackedBatch(
        tokens=tokens,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.cat([torch.zeros(1), ends]).int(),
        targets=targets,
        num_documents=len(lengths),
        max_seqlen=max_seqlen,
    )


def documents(whole: PackedBatch) -> list[PackedBatch]:
    """Each document of a batch as a batch of its own."""
    bounds = whole.cu_seqlens.tolist()
    return [
        PackedBatch(
            tokens=whole.tokens[start:end],
            positions=whole.positions[start:end],
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            targets=whole.targets[start:end],
            num_documents=1,
            max_seqlen=whole.max_seqlen,
        )
        for start, end in itertools.pairwise(bounds)
    ]


def logits(model: CausalLM, of: PackedBatch) -> Tensor:
    """[T, V]"""
    return model.model(of.tokens, of.positions, of.layout) @ model.head_weight.t()
