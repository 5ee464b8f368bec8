"""What defines a model: the facts of its config.json that change its mathematics, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from model.errors import InputError

Head = Literal["lm", "score"]
"""What is read off the hidden states: words (`CausalLM`), or one number a token (`ScalarModel`)."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context of the original training.

    kind: `linear`  (Chen et al. 2023): every frequency divided by factor.
          `dynamic` (NTK-aware): a larger base, grown with the context of the run.
          `yarn`    (Peng et al. 2023): by wavelength, between untouched and divided by factor.
          `llama3`  (Llama 3.1): the same idea with another ramp.
    original_max_position_embeddings: context of the original training (yarn, llama3).
    low_freq_factor, high_freq_factor: the ramp of llama3.
    beta_fast, beta_slow, truncate: the ramp of yarn; attention_factor, mscale, mscale_all_dim: what yarn
        multiplies cosine and sine by.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the LLaMA family. Names are those of Hugging Face's config.json where it has one.

    model_type: llama, mistral, qwen2 or qwen3: which architecture a written config.json names.
    attention_bias: a bias on the query, key and value projections (Qwen2), nowhere else.
    qk_norm: RMSNorm of every query and key head (Qwen3).
    sliding_window, max_window_layers: layers from max_window_layers on see that many tokens back, the layers
        before it see all; None for no window.
    context: the longest document of this run, at most. It fixes the rows of the rotary tables and the
        frequencies of dynamic scaling, and is not written to config.json. None for max_position_embeddings.
    head: lm, or score for a reward model (transformers' sequence classifier of one label, which has no lm_head).
    score_mean, score_std: of a reward model's raw scores on the answers it was normalised by; None for one that was
        not. Every consumer here reads (raw - score_mean) / score_std; transformers knows nothing of them.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 0
    initializer_range: float = 0.02
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    context: int | None = None
    head: Head = "lm"
    score_mean: float | None = None
    score_std: float | None = None

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise InputError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_kv_heads}). Correct one of them."
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; rotary embedding needs an even one. Correct it.")
        if (self.score_mean is None) != (self.score_std is None):
            raise InputError("score_mean and score_std belong together. Give both or neither.")
        if self.score_std is not None and not (0 < self.score_std < math.inf and math.isfinite(self.score_mean or 0.0)):
            raise InputError(
                f"score_mean {self.score_mean} and score_std {self.score_std} normalise nothing. The mean is a finite "
                "number, the deviation one above 0."
            )
        # What a config.json of the type can say.
        assert self.attention_bias == (self.model_type == "qwen2")
        assert self.qk_norm == (self.model_type == "qwen3")
        assert self.sliding_window is None or self.model_type != "llama"
        assert self.max_window_layers == 0 or self.model_type in ("qwen2", "qwen3")

    @property
    def rope_length(self) -> int:
        """Positions that a document of this run may have."""
        return self.context or self.max_position_embeddings

    def with_context(self, context: int) -> ModelConfig:
        """The same model for a run whose documents have at most `context` tokens."""
        limit = self.max_position_embeddings
        if self.rope_scaling is not None:
            original = self.rope_scaling.original_max_position_embeddings or self.max_position_embeddings
            limit = max(limit, int(original * self.rope_scaling.factor))
        if context > limit:
            raise InputError(
                f"A context of {context} tokens is longer than the {limit} that the model's config.json allows. "
                "Shorten the context, or raise max_position_embeddings (and rope_theta or rope_scaling) there."
            )
        return replace(self, context=context)

    def with_vocab_size(self, vocab_size: int) -> ModelConfig:
        return replace(self, vocab_size=vocab_size)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None."""
        return self.sliding_window if layer >= self.max_window_layers else None

    @property
    def num_parameters(self) -> int:
        """All of them, each once: a tied head counts as the embedding it is."""
        return sum(_size(shape) for shape in parameter_shapes(self).values())

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters that multiply every token: all matrices but the input embedding, with the head even if tied."""
        shapes = parameter_shapes(self)
        matrices = sum(_size(shape) for name, shape in shapes.items() if len(shape) == 2)
        is_head_tied = self.head == "lm" and self.tie_word_embeddings
        return matrices if is_head_tied else matrices - _size(shapes["model.embed_tokens.weight"])

    def flops_per_token(self, context: int, *, causal: bool = False) -> float:
        """Floating-point operations a token of one training step, forward and backward, nothing recomputed.

        6 N + 12 L H h S (Chowdhery et al. 2022, PaLM, appendix B), with N the matmul parameters, L layers, H
        heads of width h and S the context. PaLM counts attention as if every token saw the whole context;
        `causal` counts the half that causal attention computes, 6 L H h S. Sliding windows bound S.
        """
        attention = sum(min(context, self.window(layer) or context) for layer in range(self.num_layers))
        return 6 * self.num_matmul_parameters + (6 if causal else 12) * self.num_heads * self.head_dim * attention


def projections(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The matrices of a block by the name of their module, and what is stacked in each: Hugging Face's name of every
    projection and its rows."""
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "qkv_proj": {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads},
        "o_proj": {"o_proj": config.hidden_size},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
        "down_proj": {"down_proj": config.hidden_size},
    }


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the order of named_parameters(): of `CausalLM(config)`, or of
    `ScalarModel(config)` where its head is score.

    Names are Hugging Face's, but that the query, key and value projections are one matrix `qkv_proj`, and the
    gate and up projections one `gate_up_proj`, stacked in that order.
    """
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_layers):
        block: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
        block["self_attn.qkv_proj.weight"] = (qkv, width)
        if config.attention_bias:
            block["self_attn.qkv_proj.bias"] = (qkv,)
        if config.qk_norm:
            block["self_attn.q_norm.weight"] = (config.head_dim,)
            block["self_attn.k_norm.weight"] = (config.head_dim,)
        block["self_attn.o_proj.weight"] = (width, heads)
        block["post_attention_layernorm.weight"] = (width,)
        block["mlp.gate_up_proj.weight"] = (2 * config.intermediate_size, width)
        block["mlp.down_proj.weight"] = (width, config.intermediate_size)
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (width,)
    if config.head == "score":
        shapes["score.weight"] = (1, width)
    elif not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


PRESETS: dict[str, ModelConfig] = {
    # 4.1M parameters: learns the bundled sample on two CPU cores in minutes. Few wide layers, drawn wide: drawn with
    # 0.02, after 300 steps its held-out loss was 2.57 instead of 1.55.
    "tiny": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
        head_dim=64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
    ),
    "160m": ModelConfig(
        vocab_size=39424,
        hidden_size=768,
        intermediate_size=2560,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "1b": ModelConfig(
        vocab_size=39424,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_heads=32,
        num_kv_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    ),
    # The shape of Llama-2-7B with Ziya2's Chinese vocabulary.
    "7b": ModelConfig(
        vocab_size=39424,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "ziya2-13b": ModelConfig(
        vocab_size=39424,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
