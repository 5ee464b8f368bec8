"""The decoder: embedding, blocks, final norm, over packed documents."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from kernels.attention import attention
from kernels.swiglu import swiglu
from model.batch import Layout
from model.config import ModelConfig
from model.layers import Embedding, Linear, RMSNorm
from model.rope import RotaryTable, Rotation


class Cache(Protocol):
    """Keys and values of earlier tokens, as the attention of a forward pass sees them."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Keep k and v [T, K, h] of the new tokens, and attend with q [T, H, h] to all of their documents' keys."""


class Attention(nn.Module):
    """Causal attention with grouped key-value heads: H query heads share K key-value heads of width h."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer, self.window = layer, config.window(layer)
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv_proj = Linear(config.hidden_size, rows, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.o_proj = Linear(self.heads * self.width, config.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, layout: Layout | None, cache: Cache | None = None) -> Tensor:
        """[T, d] -> [T, d]"""
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.width))  # [T, H + 2K, h]
        if self.q_norm is None or self.k_norm is None:
            q, k, v = rotation.split(qkv, self.heads, self.kv_heads)
        else:
            # The norms keep the product for their backward anyway, so the values may stay a view of it.
            q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = rotation(self.q_norm(q), self.k_norm(k))
        if cache is not None:
            out = cache.attend(self.layer, q, k, v, self.window)  # [T, H, h]
        else:
            assert layout is not None
            bounds = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_q, layout.max_k
            out = attention(q, k, v, *bounds, window=self.window)
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d] -> [T, d]"""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class Block(nn.Module):
    """One layer: what sharding, activation checkpointing and compilation wrap."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rotation: Rotation, layout: Layout | None, cache: Cache | None = None) -> Tensor:
        """hidden [T, d]: the residual stream before the layer -> after it."""
        attended = self.self_attn(self.input_layernorm(hidden), rotation, layout, cache)
        normed, hidden = self.post_attention_layernorm.after_add(attended, hidden)
        # The next block's norm could take this sum in, too, and save the traffic of three [T, d]: by arithmetic a
        # thousandth or two of a step. But blocks would then pass two tensors on, and full recomputation keep both.
        return hidden + self.mlp(normed)


class Transformer(nn.Module):
    """Tokens in, final hidden states out. Parameters are empty until initialised or loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: Layout | None,
        embedding_noise: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: int64 [T].
            positions: int64 [T], within each document, below `config.rope_length`.
            layout: bounds of the documents; None with a cache, which knows them.
            embedding_noise: [T, d], any float dtype, added to the embeddings in theirs (NEFTune, Jain et al. 2023).
            cache: for generation; then documents go on where the cache's end, and there are no gradients.
        Returns:
            [T, d]; a document's rows depend on that document alone.
        """
        hidden = self.embed_tokens(tokens)  # [T, d]
        if embedding_noise is not None:
            hidden = hidden + embedding_noise.to(hidden.dtype)
        rotation = self.rotary(positions)
        for layer in self.layers:
            hidden = layer(hidden, rotation, layout, cache)
        return self.norm(hidden)
