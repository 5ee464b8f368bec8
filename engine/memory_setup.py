"""How a model is trained, as far as memory is concerned: what a plan is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.memory_heads import FP32, Loss
from engine.recompute import Recompute
from engine.shard import Precision
from model.lora import LoraSpec


@dataclass(frozen=True)
class Setup:
    """Sizes of a step, and what shares them.

    tokens_per_pack: tokens of one forward pass.
    context: the longest document; no pack can be shorter.
    world, replicas: processes, and groups of them that each hold a whole model (HSDP).
    micro_batches: forward passes of one rank in a step; from the second on there are gradients already.
    fp8: the blocks' products take 8-bit copies, which are there while a product works.
    loss: what a language model's head is asked for.
    device: where the head computes; it sets the size of its chunks.
    lora: what is trained; None for all of a model.
    """

    tokens_per_pack: int
    context: int
    world: int = 1
    replicas: int = 1
    precision: Precision = "bf16"
    fp8: bool = False
    recompute: Recompute = "none"
    reshard_after_forward: bool = True
    micro_batches: int = 1
    loss: Loss = "cross_entropy"
    device: Literal["cuda", "cpu"] = "cuda"
    lora: LoraSpec | None = None

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.world // self.replicas

    @property
    def is_wrapped(self) -> bool:
        """Whether FSDP is at work; one process does without it."""
        return self.world > 1

    @property
    def number_bytes(self) -> int:
        return 2 if self.precision == "bf16" else FP32
