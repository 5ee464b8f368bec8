"""How much memory a rank needs to train a model, or to read with it: from shapes alone, before anything is allocated.

A step passes through moments that can hold the most; for each, the plan adds up the tensors alive on one rank,
and the largest total is the peak. With N parameters, b bytes a computed number (2 in bf16, 4 in fp32) and S
ranks that share a copy of the model:

    weights      4 N / S masters; and in b bytes, gathered by FSDP, the root (embedding, final norm, head) for the
                 whole step and each block while it computes
    gradients    4 N / S; and what a unit needs until it is reduced: its gradients in b bytes, then whole in fp32
    optimizer    8 N / S: two moments
    activations  what the forward keeps for the backward, by recompute mode, and the work of one block
    head         logits of some tokens, their gradient, and those of hidden states and head: `engine.memory_heads`

The plan follows `engine.shard`, `engine.recompute`, FSDP2's buffers and what each op saves, and tests hold it to
the bytes of real steps. Blocks that torch.compile has rewritten keep, as a rule, less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.memory_heads import FP32, Loss, head_cost
from engine.recompute import Recompute
from engine.shard import Precision
from model.config import ModelConfig, parameter_shapes

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
    loss: what a language model's head is asked for.
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
    loss: Loss = "cross_entropy"
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

    def replan(self, setup: Setup) -> MemoryPlan:
        """The same model in other sizes."""
        return plan(self.config, setup)


def plan(config: ModelConfig, setup: Setup) -> MemoryPlan:
    """Plan one training step on rank 0, the rank that holds the most.

    Args:
        config: of a `CausalLM`, or of a `ScalarModel` where its head is score.
    """
    return MemoryPlan(config, setup, _Planner(config, setup).moments())


def reading(config: ModelConfig, setup: Setup, is_frozen: bool) -> tuple[Moment, ...]:
    """The moments of a forward pass without a backward: the last block at work, and the head.

    Args:
        is_frozen: the weights are stored as they are computed with, and nothing trains them.
    """
    return _Planner(config, setup, is_frozen).reading()


def stored_bytes(config: ModelConfig, setup: Setup, is_frozen: bool) -> int:
    """A rank's weights while nobody reads with them: fp32 masters, or of a frozen model what it computes with."""
    return _Planner(config, setup, is_frozen).masters


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

    def __init__(self, config: ModelConfig, setup: Setup, is_frozen: bool = False) -> None:
        self.config, self.setup, self.is_frozen = config, setup, is_frozen
        self.b = setup.number_bytes
        self.layers = config.num_layers
        shapes = parameter_shapes(config)
        of_block = [shape for name, shape in shapes.items() if name.startswith("model.layers.0.")]
        of_root = [shape for name, shape in shapes.items() if not name.startswith(("model.layers.", "score."))]
        self.block, self.root = _unit(of_block, setup), _unit(of_root, setup)
        # The head of one number is a unit of its own, in fp32.
        self.score = _unit([shapes["score.weight"]], setup).padded if config.head == "score" else 0
        self.matrix = config.vocab_size * config.hidden_size  # the embedding; also the head
        self.stream = self.b * setup.tokens_per_pack * config.hidden_size  # [T, d]
        self.head = head_cost(config, setup.loss, setup.tokens_per_pack, self.b, setup.device)
        trunk = self.layers * self.block.padded + self.root.padded
        stored = self.b if is_frozen else FP32
        self.masters = (stored * trunk + FP32 * self.score) // setup.shards

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
            weights=self._gathered(kept_gathered) + late_buffer + self._gathered_score(),
            gradients=self._of_earlier_packs(),
            # Beside what the final norm keeps, its result, which the head reads.
            activations=self._kept(self.layers) + self._kept_by_final_norm() + self.stream,
            head=self.head.forward,
        )

    def _loss_backward(self) -> Moment:
        """The gradients of hidden states and head."""
        return self._moment(
            "backward of the head",
            weights=self._gathered_in_backward(self.layers) + self._gathered_score(),
            gradients=self._of_earlier_packs() + self.head.gradient,
            activations=self._kept(self.layers) + self._kept_by_final_norm() + self.stream,
            head=self.head.backward,
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
            gradients=self._finished(layer + 1) + self.head.gradient + self._in_reduction(self.block),
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

    def _moment(self, name: str, *, weights: int, gradients: int = 0, activations: int = 0, head: int = 0) -> Moment:
        """Adds what is there at every moment."""
        config, setup = self.config, self.setup
        tables = 2 * config.rope_length * (config.head_dim // 2) * FP32  # cosines and sines
        pack = 3 * setup.tokens_per_pack * INT64  # tokens, positions, targets
        optimizer = 0 if self.is_frozen else 2 * self.masters
        return Moment(name, self.masters + weights, gradients, optimizer, activations + tables + pack, head)

    # The moments of a forward pass that nothing is kept of.

    def reading(self) -> tuple[Moment, ...]:
        # A model in training may be told to leave its blocks gathered; a frozen one never is.
        kept_gathered = 0 if self.setup.reshard_after_forward or self.is_frozen else self.layers
        late_buffer = self.b * self.block.padded if self.setup.shards > 1 else 0  # of a gather, until the next
        tensors = self._block_tensors()
        norm = tensors["norms' results"] // 2
        queries = ("qkv_proj", "queries, keys, values", "attention", "o_proj")
        feed_forward = ("o_proj", "stream after attention", "gate_up_proj", "activation")
        at_work = norm + max(sum(tensors[name] for name in names) for names in (queries, feed_forward))
        gathered = self._gathered(kept_gathered or 1)
        block = self._moment("block", weights=gathered + late_buffer, activations=tensors["input"] + at_work)
        head = self._moment(
            "head",
            weights=self._gathered(kept_gathered) + late_buffer + self._gathered_score(),
            activations=self.stream,
            head=self.head.scoring,
        )
        return block, head

    # Weights that FSDP has gathered.

    def _gathered_once(self) -> int:
        """One block."""
        return self.b * self.block.padded if self.setup.is_wrapped else 0

    def _gathered(self, blocks: int) -> int:
        """The root and some blocks."""
        return (self.b * self.root.padded if self.setup.is_wrapped else 0) + blocks * self._gathered_once()

    def _gathered_score(self) -> int:
        """The head of one number, and the buffer that it is gathered in."""
        if not self.setup.is_wrapped:
            return 0
        return FP32 * self.score * (2 if self.setup.shards > 1 else 1)

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
            return FP32 * self.head.gradient // self.b if self.setup.micro_batches == 1 else 0
        buffer = FP32 * self.block.padded
        if is_first:
            buffer = FP32 * (self.score or (self.root.padded if self.setup.micro_batches > 1 else 0))
        return self.head.gradient + buffer

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
