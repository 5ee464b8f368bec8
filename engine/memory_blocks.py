"""Bytes of a block's activations: made, kept for the backward pass, and there when that works on the block.

What is kept depends on the recompute mode and on what is trained.

T tokens, d width, H and K heads of width h, F feed-forward width, b bytes a computed number, r the rank of adapters.
"""

from __future__ import annotations

from engine.memory_heads import FP32
from engine.memory_setup import Setup
from model.config import ModelConfig, projections
from model.lora import is_trained


class BlockTensors:
    """The tensors of one block.

    Where all weights are trained, every product's input is kept for the gradient of its weight, or what it is made of
    again. Where adapters are, those of products that have one; and in the first block, whose input no gradient reaches
    unless the embedding is trained, nothing that would only pass a gradient down.
    """

    def __init__(self, config: ModelConfig, setup: Setup) -> None:
        self.config, self.setup = config, setup
        self.is_input_reached = setup.lora is None or is_trained("model.embed_tokens.weight", setup.lora)
        self.has_dropout = setup.lora is not None and setup.lora.dropout > 0
        tokens = setup.tokens_per_pack
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        row = setup.number_bytes * tokens
        self.bytes = {
            "input": row * config.hidden_size,  # the residual stream
            "first norm": row * config.hidden_size,  # read by qkv_proj
            "first norm's scales": FP32 * tokens,
            "qkv_proj": row * (heads + 2 * kv_heads) * width,
            "scales of queries and keys": FP32 * tokens * (heads + kv_heads if config.qk_norm else 0),
            # For attention, which keeps them; the norms of queries and keys keep the product, and the values in it.
            "queries, keys, values": row * (heads + (1 if config.qk_norm else 2) * kv_heads) * width,
            "attention": row * heads * width,
            "attention, dropped": row * heads * width,  # read by the adapter of o_proj
            "attention's log-sum-exp": FP32 * tokens * heads,
            "o_proj": row * config.hidden_size,
            "stream after attention": row * config.hidden_size,
            "second norm": row * config.hidden_size,  # read by gate_up_proj
            "second norm's scales": FP32 * tokens,
            "gate_up_proj": 2 * row * config.intermediate_size,
            "activation": row * config.intermediate_size,
            "down_proj": row * config.hidden_size,
        }
        # [T, r] of each adapter, by the module that it is in.
        self.low_rank = {
            module: row * (0 if setup.lora is None else setup.lora.rank * sum(setup.lora.present(parts)))
            for module, parts in projections(config).items()
        }

    def kept(self, is_first: bool) -> int:
        """For the backward pass; sums that only pass through are let go."""
        if self.setup.recompute == "full":
            return self.bytes["input"]
        return self._sum(self._needed(is_first)) + sum(self.low_rank.values())

    def at_work(self, is_first: bool) -> int:
        """When the backward pass has reached the activation function: what is kept or was made again, and gradients."""
        needed = self._needed(is_first) - {"activation"}
        if self.setup.recompute == "full":
            needed |= {"input"}
        kept = self._sum(needed) + sum(self.low_rank.values()) - self.low_rank["down_proj"]
        return kept + self._sum(("input", "activation", "gate_up_proj"))  # gradients, each as large as what it is of

    def in_8_bits(self, is_first: bool) -> int:
        """When the backward pass is in the product of gates, with 8-bit copies of what is multiplied.

        The activation's gradient and what that was made of are gone. Copies of the upstream gradient lie both ways;
        that of the weight gives way to that of the input when one result is there.
        """
        b, tokens, width = self.setup.number_bytes, self.setup.tokens_per_pack, self.config.hidden_size
        out = 2 * self.config.intermediate_size
        of_input = 2 * tokens * out + out * width + b * tokens * width
        of_weight = tokens * (out + width) + b * (tokens + out) * width
        return self._beside_gates(is_first) + max(of_input, of_weight)

    def widened(self, is_first: bool) -> int:
        """When that product's gradients are there, and autograd has made fp32 of the weight's."""
        b, tokens, width = self.setup.number_bytes, self.setup.tokens_per_pack, self.config.hidden_size
        of_weight = (b + FP32) * 2 * self.config.intermediate_size * width
        gone = ("gate_up_proj",) if self.setup.recompute == "none" else ("gate_up_proj", "second norm")  # if made again
        return self._beside_gates(is_first) - self._sum(gone) + b * tokens * width + of_weight

    def _beside_gates(self, is_first: bool) -> int:
        """In the backward pass of the product of gates, with the upstream gradient."""
        there = self.at_work(is_first) - self._sum(("activation", "gate_up_proj"))
        # Made again.
        return there + (self.bytes["second norm"] if self.setup.recompute == "selective" else 0)

    def reading(self) -> int:
        """At most, in a forward pass that nothing is kept of."""
        queries = ("qkv_proj", "queries, keys, values", "attention", "o_proj")
        feed_forward = ("o_proj", "stream after attention", "gate_up_proj", "activation")
        return self._sum(("input", "first norm")) + max(self._sum(queries), self._sum(feed_forward))

    def _sum(self, names: set[str] | tuple[str, ...]) -> int:
        return sum(self.bytes[name] for name in names)

    def _needed(self, is_first: bool) -> set[str]:
        """What the backward pass asks for, of `bytes`, and does not make again from the rest."""
        is_full = self.setup.lora is None
        reads = {module: is_full or size > 0 for module, size in self.low_rank.items()}
        # What a gradient reaches: the block's input, the queries, the stream behind them, gate and up.
        is_input = self.is_input_reached or not is_first
        are_queries = is_input or reads["qkv_proj"]
        is_stream = are_queries or reads["o_proj"]
        are_gates = is_stream or reads["gate_up_proj"]
        of_queries = {"queries, keys, values", "attention", "attention's log-sum-exp", "scales of queries and keys"}
        if self.config.qk_norm:
            of_queries |= {"qkv_proj"}
        wanted = {
            "input": is_input,
            "first norm's scales": is_input,
            "first norm": reads["qkv_proj"],
            **dict.fromkeys(of_queries, are_queries),
            "attention": are_queries or reads["o_proj"],
            # Dropout gives adapters a copy to read, in place of the original but where that is kept for itself.
            "attention, dropped": are_queries and self.has_dropout and self.low_rank["o_proj"] > 0,
            "stream after attention": is_stream,
            "second norm's scales": is_stream,
            "second norm": reads["gate_up_proj"],
            "gate_up_proj": are_gates,
            "activation": reads["down_proj"],
        }
        if self.setup.recompute == "selective":
            # What an op has made that keeps its own inputs, because a gradient reaches it.
            made_again = {
                "first norm": is_input,
                "queries, keys, values": are_queries and self.config.qk_norm,
                "attention, dropped": are_queries,
                "second norm": is_stream,
                "activation": are_gates,
            }
            wanted |= dict.fromkeys((name for name, is_made in made_again.items() if is_made), False)
        return {name for name, is_wanted in wanted.items() if is_wanted}
