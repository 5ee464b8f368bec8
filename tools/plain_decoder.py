"""A LLaMA decoder in plain PyTorch, as one would write it today: what the compiler makes of it is a peer of ours.

Fused query-key-value and gate-up products, F.rms_norm, F.scaled_dot_product_attention (causal, its flash kernels),
F.cross_entropy over whole logits. `compile` compiles each block, and the head with its loss, by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.batch import IGNORE
from model.config import ModelConfig


class _Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sizes = config.num_heads, config.num_kv_heads, config.num_kv_heads
        self.width, self.eps = config.head_dim, config.rms_norm_eps
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(hidden))
        self.qkv = nn.Linear(hidden, sum(self.sizes) * self.width, bias=False)
        self.out = nn.Linear(heads, hidden, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(hidden))
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, d]; cos, sin [S, h] -> [B, S, d]"""
        qkv = self.qkv(F.rms_norm(x, x.shape[-1:], self.attention_norm, self.eps))
        q, k, v = qkv.unflatten(-1, (-1, self.width)).transpose(1, 2).split(self.sizes, dim=1)  # [B, H or K, S, h]
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        is_grouped = self.sizes[0] != self.sizes[1]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves, in fp32. x [..., S, h]"""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class PlainDecoder(nn.Module):
    """A language model, or a scorer where the configuration's head is score.

    Args:
        checkpointing: keep each block's input only, and compute the block again in the backward pass.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_scorer, self.eps, self.checkpointing = config.head == "score", config.rms_norm_eps, False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = nn.Linear(config.hidden_size, 1 if self.is_scorer else config.vocab_size, bias=False)
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angles = torch.outer(torch.arange(config.rope_length).float(), config.rope_theta**-half).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def compile_parts(self, backend: str | Callable[..., Any] = "inductor", is_ragged: bool = False) -> None:
        """Compile the block and the head, each as one graph; of ragged rows for sizes that change between batches."""
        options: dict[str, Any] = {"backend": backend, "fullgraph": True, "dynamic": is_ragged}
        for block in self.blocks:
            block.compile(**options)
        self._loss = torch.compile(self._loss, **options)  # type: ignore[method-assign]

    def forward(self, tokens: Tensor, targets: Tensor, ends: Tensor) -> Tensor:
        """Of a language model the sum of all targets' losses, a scalar; of a scorer each row's score at its end, [B].

        Args:
            tokens, targets: int64 [B, S]. ends: int64 [B].
        """
        length = tokens.shape[1]
        x, cos, sin = self.embedding(tokens), self.cos[:length], self.sin[:length]
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin)
        if self.is_scorer:
            x = x[torch.arange(len(x), device=x.device), ends]
            return self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.eps)).squeeze(-1).float()
        return self._loss(x, targets)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(F.rms_norm(x, x.shape[-1:], self.norm, self.eps)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
