"""How much memory a rank needs to train a model: from shapes alone, before anything is allocated.

A step passes through moments that can hold the most; for each, the plan adds up the tensors alive on one rank,
and the largest total is the peak. With N parameters, b bytes a computed number (2 in bf16, 4 in fp32) and S
ranks that share a copy of the model:

    weights      4 N / S masters; and in b bytes, gathered by FSDP, the root (embedding, final norm, head) for the
                 whole step and each block while it computes
    gradients    4 N / S; and what a unit needs until it is reduced: its gradients in b bytes, then whole in fp32
    optimizer    8 N / S: two moments
    activations  what the forward keeps for the backward, by recompute mode, and the work of one block
    head         a chunk of logits, their gradient, and those of hidden states and head, which the loss forms at once

The plan follows `engine.shard`, `engine.recompute`, FSDP2's buffers and what each op saves, and tests hold it to
the bytes of real steps. Blocks that torch.compile has rewritten keep, as a rule, less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from engine.recompute import Recompute
from engine.shard import Precision
from kernels.linear_cross_entropy import token_groups
from kernels.vocabulary import chunks, padded, runs, workspace
from model.config import ModelConfig, parameter_shapes

FP32 = 4
INT64 = 8
# What holds no tensor: on a GPU the CUDA context, the libraries' workspaces and NCCL's buffers, on a CPU the
# interpreter and its libraries. And gaps between tensors, which no allocator can all use: about a twentieth.
RESERVED_BYTES = {"cuda": 2 << 30, "cpu": 1 << 29}
USABLE_SHARE = 0.95


@dataclass(frozen=True)
class Setup:
    """How a model is trained, as far as memory is concerned.

    tokens_per_pack: tokens of one forward pass.
    context: the longest document; no pack can be shorter.
    world, replicas: processes, and groups of them that each hold a whole model (HSDP).
    micro_batches: forward passes of one rank in a step; from the second on there are gradients already.
    device: where the head computes; it sets the size of its chunks.
    """

    tokens_per_pack: int
    context: int
    world: int = 1
    replicas: int = 1
    precision: Precision = "bf16"
    recompute: Recompute = "none"
    reshard_after_forward: bool = True
    micro_batches: int = 1
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the model."""
        return self.world // self.replicas

    @property
    def is_wrapped(self) -> bool:
        """Whether FSDP is at work; one process in fp32 does without it."""
        return self.world > 1 or self.precision == "bf16"

    @property
    def number_bytes(self) -> int:
        return 2 if self.precision == "bf16" else FP32


@dataclass(frozen=True)
class Moment:
    """Bytes alive on one rank at one point of a step."""

    name: str
    weights: int
    gradients: int
    optimizer: int
    activations: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class MemoryPlan:
    """The moments of a step, in order."""

    config: ModelConfig
    setup: Setup
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment that holds the most."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def at_rest(self) -> Moment:
        """What a rank holds when the optimizer updates: no activations, nothing gathered."""
        return self.moments[-1]

    @property
    def needed_bytes(self) -> int:
        """Memory that a device must have: the peak, gaps, and what holds no tensor."""
        return math.ceil(self.peak.total / USABLE_SHARE) + RESERVED_BYTES[self.setup.device]

    def fits(self, device_bytes: int) -> bool:
        """Whether a device with so much memory can run this."""
        return self.needed_bytes <= device_bytes


def plan(config: ModelConfig, setup: Setup) -> MemoryPlan:
    """Plan one training step of `CausalLM(config)` on rank 0, the rank that holds the most."""
    return MemoryPlan(config, setup, _Planner(config, setup).moments())


@dataclass(frozen=True)
class _Unit:
    """Parameters that FSDP gathers, and whose gradients it reduces, all at once; numbers of entries.

    size: as they are.
    padded: with every rank's rows padded to rank 0's.
    last: of the last parameter.
    """

    size: int
    padded: int
    last: int


def _unit(shapes: list[tuple[int, ...]], setup: Setup) -> _Unit:
    sizes = [math.prod(shape) for shape in shapes]
    padded = [math.ceil(rows / setup.shards) * setup.shards * math.prod(rest) for rows, *rest in shapes]
    return _Unit(sum(sizes), sum(padded), sizes[-1])


class _Planner:
    """T tokens, d width, H and K heads of width h, F feed-forward width, V vocabulary; results are bytes."""

    def __init__(self, config: ModelConfig, setup: Setup) -> None:
        self.config, self.setup = config, setup
        self.b = setup.number_bytes
        self.layers = config.num_layers
        shapes = parameter_shapes(config)
        self.block = _unit([shape for name, shape in shapes.items() if name.startswith("model.layers.0.")], setup)
        self.root = _unit([shape for name, shape in shapes.items() if not name.startswith("model.layers.")], setup)
        self.matrix = config.vocab_size * config.hidden_size  # the embedding; also the head
        self.stream = self.b * setup.tokens_per_pack * config.hidden_size  # [T, d]
        self.masters = FP32 * (self.layers * self.block.padded + self.root.padded) // setup.shards

    def moments(self) -> tuple[Moment, ...]:
        in_blocks: list[Moment] = []
        for layer in reversed(range(self.layers)):
            in_blocks.append(self._block_backward(layer))
            if self.setup.is_wrapped:
                in_blocks.append(self._block_reduction(layer))
        in_root = [self._embedding_backward(), *([self._root_reduction()] if self.setup.is_wrapped else [])]
        update = Moment("optimizer update", self.masters, self.masters, 2 * self.masters)
        return (self._loss(), self._loss_backward(), *in_blocks, *in_root, update)

    # The moments of a step, in order.

    def _loss(self) -> Moment:
        """The last chunk of the cross-entropy, when the forward pass has kept all it keeps."""
        late_buffer = self.b * self.block.padded if self.setup.shards > 1 else 0  # of the last block's gather
        kept_gathered = 0 if self.setup.reshard_after_forward else self.layers
        return self._moment(
            "loss",
            weights=self._gathered(kept_gathered) + late_buffer,
            gradients=self._of_earlier_packs(),
            # Beside what the final norm keeps, its result, which the head reads.
            activations=self._kept(self.layers) + self._kept_by_final_norm() + self.stream,
            head=self._head_forward(),
        )

    def _loss_backward(self) -> Moment:
        """The gradients that the head has kept are multiplied into new ones."""
        return self._moment(
            "backward of the head",
            weights=self._gathered_in_backward(self.layers),
            gradients=self._of_earlier_packs() + self.b * self.matrix,
            activations=self._kept(self.layers) + self._kept_by_final_norm() + self.stream,
            head=self.stream + self.b * self.matrix,
        )

    def _block_backward(self, layer: int) -> Moment:
        """The gradient of a block's activation function, when what the block keeps is all there."""
        is_first = layer == self.layers - 1
        return self._moment(
            f"backward of block {layer}",
            weights=self._gathered_in_backward(layer) + self._gathered_once(),
            gradients=self._finished(layer + 1) + self._unreduced(is_first) + self._of_down_proj(),
            activations=self._kept(layer) + self._block_at_work(),
        )

    def _block_reduction(self, layer: int) -> Moment:
        """A block's gradients are summed over ranks."""
        return self._moment(
            f"reduction of block {layer}",
            weights=self._gathered_in_backward(layer),
            gradients=self._finished(layer + 1) + self.b * self.matrix + self._in_reduction(self.block),
            activations=self._kept(layer) + self.stream,
        )

    def _embedding_backward(self) -> Moment:
        """The embedding's gradient, beside the head's: with tied weights they are added once both are there."""
        return self._moment(
            "backward of the embedding",
            weights=self._gathered(0),
            gradients=self._finished(0) + self._unreduced(is_first=False) + self.b * self.matrix,
            activations=self.stream,
        )

    def _root_reduction(self) -> Moment:
        """The gradients of embedding, final norm and head are summed over ranks."""
        return self._moment(
            "reduction of the root",
            weights=0,
            gradients=self._finished(0) + self._in_reduction(self.root),
        )

    def _moment(self, name: str, *, weights: int, gradients: int, activations: int = 0, head: int = 0) -> Moment:
        """Adds what is there at every moment."""
        config, setup = self.config, self.setup
        tables = 2 * config.rope_length * (config.head_dim // 2) * FP32  # cosines and sines
        pack = 3 * setup.tokens_per_pack * INT64  # tokens, positions, targets
        return Moment(name, self.masters + weights, gradients, 2 * self.masters, activations + tables + pack, head)

    # Weights that FSDP has gathered.

    def _gathered_once(self) -> int:
        """One block."""
        return self.b * self.block.padded if self.setup.is_wrapped else 0

    def _gathered(self, blocks: int) -> int:
        """The root and some blocks."""
        return (self.b * self.root.padded if self.setup.is_wrapped else 0) + blocks * self._gathered_once()

    def _gathered_in_backward(self, layer: int) -> int:
        """The root and the blocks below a layer: all of them if they stayed, or the next one's, fetched ahead."""
        if not self.setup.reshard_after_forward:
            return self._gathered(layer)
        return self._gathered(1 if self.setup.shards > 1 and layer > 0 else 0)

    # Gradients.

    def _of_earlier_packs(self) -> int:
        """From the step's earlier micro-batches: all gradients, and the root's buffer, which FSDP lets go late."""
        if self.setup.micro_batches == 1:
            return 0
        return self.masters + (FP32 * self.root.padded if self.setup.is_wrapped else 0)

    def _finished(self, layer: int) -> int:
        """Reduced gradients of the blocks from a layer on, or of everything from earlier micro-batches."""
        if self.setup.micro_batches > 1:
            return self.masters
        return FP32 * (self.layers - layer) * self.block.padded // self.setup.shards

    def _unreduced(self, is_first: bool) -> int:
        """The head's gradient waits for the root's reduction; a reduced unit's buffer waits for the next unit."""
        if not self.setup.is_wrapped:
            return FP32 * self.matrix if self.setup.micro_batches == 1 else 0
        buffer = FP32 * self.block.padded
        if is_first:
            buffer = FP32 * self.root.padded if self.setup.micro_batches > 1 else 0
        return self.b * self.matrix + buffer

    def _of_down_proj(self) -> int:
        """The one matrix of a block whose gradient is there before the activation function's."""
        is_added = not self.setup.is_wrapped and self.setup.micro_batches > 1  # into that of an earlier pack
        return 0 if is_added else self.b * self.block.last

    def _in_reduction(self, unit: _Unit) -> int:
        """A unit's gradients go into an fp32 buffer, and that into this rank's part; FSDP forgets to drop the last."""
        forgotten = self.b * unit.last if self.setup.shards > 1 else 0
        return FP32 * unit.padded + max(self.b * unit.size, FP32 * unit.padded // self.setup.shards + forgotten)

    # Activations.

    def _block_tensors(self) -> dict[str, int]:
        """What one block makes in its forward pass, by name."""
        config, tokens = self.config, self.setup.tokens_per_pack
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        row = self.b * tokens
        return {
            "input": row * config.hidden_size,  # the residual stream
            "norms' results": 2 * row * config.hidden_size,  # read by qkv_proj and gate_up_proj
            "norms' scales": FP32 * tokens * (2 + (heads + kv_heads if config.qk_norm else 0)),
            "qkv_proj": row * (heads + 2 * kv_heads) * width,
            # For attention, which keeps them; the norms of queries and keys keep the product, and the values in it.
            "queries, keys, values": row * (heads + (1 if config.qk_norm else 2) * kv_heads) * width,
            "attention": row * heads * width,
            "attention's log-sum-exp": FP32 * tokens * heads,
            "o_proj": row * config.hidden_size,
            "stream after attention": row * config.hidden_size,
            "gate_up_proj": 2 * row * config.intermediate_size,
            "activation": row * config.intermediate_size,
            "down_proj": row * config.hidden_size,
        }

    def _kept_by_block(self) -> int:
        """What one block keeps for its backward pass; sums that only pass through are let go."""
        tensors = self._block_tensors()
        if self.setup.recompute == "full":
            return tensors["input"]
        if self.setup.recompute == "selective":
            products = (
                "qkv_proj",
                "attention",
                "attention's log-sum-exp",
                "o_proj",
                "gate_up_proj",
                "down_proj",
            )
            return tensors["input"] + sum(tensors[name] for name in products)
        return sum(tensors.values()) - sum(tensors[name] for name in self._passed_on())

    def _passed_on(self) -> tuple[str, ...]:
        """What the backward pass does not ask for: sums, and a product that has been laid out anew."""
        return ("o_proj", "down_proj") if self.config.qk_norm else ("o_proj", "down_proj", "qkv_proj")

    def _kept(self, blocks: int) -> int:
        return blocks * self._kept_by_block()

    def _kept_by_final_norm(self) -> int:
        return self.stream + FP32 * self.setup.tokens_per_pack

    def _block_at_work(self) -> int:
        """A block whose backward pass has reached its activation function."""
        tensors = self._block_tensors()
        kept = sum(tensors.values()) - sum(tensors[name] for name in self._passed_on()) - tensors["activation"]
        is_torch_product = self.setup.device == "cuda" or self.b < FP32
        if self.setup.recompute == "selective" and is_torch_product:
            kept += tensors["down_proj"]  # kept like every product; recomputing ends before it would be taken
        gradients = self.stream + tensors["activation"] + tensors["gate_up_proj"]
        return kept + gradients

    # Head.

    def _head_forward(self) -> int:
        """`linear_cross_entropy`: its results, and what it holds beside them."""
        config, tokens = self.config, self.setup.tokens_per_pack
        device = torch.device(self.setup.device)
        dtype = torch.bfloat16 if self.b < FP32 else torch.float32
        if self.setup.device == "cpu":
            return self._head_forward_on_cpu(chunks(tokens, config.vocab_size, dtype, device))
        shape = tokens, config.vocab_size, config.hidden_size
        group, chunk = token_groups(*shape, dtype, workspace(device))
        groups = runs(tokens, group)
        group = groups[0].stop
        chunk = runs(group, chunk)[0].stop
        buffers = padded(config.vocab_size) * (FP32 * chunk + self.b * group)
        total = FP32 * self.matrix if len(groups) > 1 else 0
        results = self.stream + self.b * self.matrix
        copy = self.stream  # of the hidden states, without those that have no target
        return results + copy + buffers + total + 2 * FP32 * tokens

    def _head_forward_on_cpu(self, parts: list[slice]) -> int:
        """Gradients in fp32, a chunk of logits, and the most that stands beside them."""
        gradients = FP32 * (self.setup.tokens_per_pack * self.config.hidden_size + self.matrix)
        logits = FP32 * self.config.vocab_size * parts[0].stop
        beside = 0
        if len(parts) > 1:
            # The next chunk's logits, or this chunk's part of the head's gradient before it is added.
            beside = max(logits, FP32 * self.matrix)
        if self.b < FP32:
            # A product's operands are widened, the weight once for all; at the end the gradients are rounded.
            widened = FP32 * self.config.hidden_size * parts[0].stop
            beside = max(beside + widened, self.stream + self.b * self.matrix) + FP32 * self.matrix
        return gradients + logits + beside
