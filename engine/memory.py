"""How much memory a rank needs to train a model, or to read with it: from shapes alone, before anything is allocated.

A step passes through moments that can hold the most; for each, the plan adds up the tensors alive on one rank,
and the largest total is the peak. With N parameters, b bytes a computed number (2 in bf16, 4 in fp32) and S
ranks that share a copy of the model:

    weights      4 N / S masters; and in b bytes, gathered by FSDP, the root (embedding, final norm, head) for the
                 whole step and each block while it computes, or all of them from the first to the last micro-batch
    gradients    4 N / S; and what a unit needs until it is reduced: its gradients in b bytes, then whole in fp32
    optimizer    8 N / S: two moments
    activations  what the forward keeps for the backward, by recompute mode, and the work of one block
    head         logits of some tokens, their gradient, and those of hidden states and head: `engine.memory_heads`

Where adapters are trained, N counts their parameters, and the others are frozen: b N / S, without gradients or moments,
and the first block's input, which no gradient reaches, is not kept.

The plan follows `engine.shard`, `engine.recompute`, FSDP2's buffers and what each op saves, and tests hold it to
the bytes of real steps. Blocks that torch.compile has rewritten keep, as a rule, less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from engine.memory_blocks import BlockTensors
from engine.memory_heads import FP32, head_cost
from engine.memory_setup import Setup as Setup
from engine.units import Unit, all_shapes, block_unit, root_unit, score_unit, trained_shapes, unit_of
from model.config import ModelConfig

INT64 = 8
# What holds no tensor: on a GPU the CUDA context, the libraries' workspaces and NCCL's buffers, on a CPU the
# interpreter and its libraries. And gaps between tensors, which no allocator can all use: about a twentieth.
RESERVED_BYTES = {"cuda": 2 << 30, "cpu": 1 << 29}
USABLE_SHARE = 0.95


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
    """The moments of a step, in order. frozen: bytes of the weights that are never trained."""

    config: ModelConfig
    setup: Setup
    moments: tuple[Moment, ...]
    frozen: int = 0

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
    planner = _Planner(config, setup)
    return MemoryPlan(config, setup, planner.moments(), planner.frozen)


def reading(config: ModelConfig, setup: Setup, is_frozen: bool) -> tuple[Moment, ...]:
    """The moments of a forward pass without a backward: the last block at work, and the head.

    Args:
        is_frozen: the weights are stored as they are computed with, and nothing trains them.
    """
    return _Planner(config, setup, is_frozen).reading()


def stored_bytes(config: ModelConfig, setup: Setup, is_frozen: bool) -> int:
    """A rank's weights while nobody reads with them: fp32 masters, or of a frozen model what it computes with."""
    return _Planner(config, setup, is_frozen).stored


def master_bytes(config: ModelConfig, setup: Setup) -> int:
    """A rank's fp32 masters of what is trained; its moments take twice as much."""
    return _Planner(config, setup).masters


# The last product of a block.
_LAST = "model.layers.0.mlp.down_proj."


class _Planner:
    """T tokens, d width, H and K heads of width h, F feed-forward width, V vocabulary; results are bytes."""

    def __init__(self, config: ModelConfig, setup: Setup, is_frozen: bool = False) -> None:
        self.config, self.setup, self.is_frozen = config, setup, is_frozen
        self.b = setup.number_bytes
        self.layers = config.num_layers
        shapes = all_shapes(config, setup)
        trained = {} if is_frozen else trained_shapes(shapes, setup)
        self.block, self.root = block_unit(shapes, setup), root_unit(shapes, setup)
        self.trained_block, self.trained_root = block_unit(trained, setup), root_unit(trained, setup)
        # The head of one number is a unit of its own, in fp32.
        self.score = score_unit(shapes, setup).padded
        self.is_embedding_trained = "model.embed_tokens.weight" in trained
        self.matrix = config.vocab_size * config.hidden_size  # the embedding; also the head
        self.stream = self.b * setup.tokens_per_pack * config.hidden_size  # [T, d]
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        is_head_frozen = config.head == "lm" and head not in trained
        self.head = head_cost(config, setup.loss, setup.tokens_per_pack, self.b, setup.device, is_head_frozen)
        self.tensors = BlockTensors(config, setup)
        in_training = self.layers * self.trained_block.padded + self.trained_root.padded
        self.frozen = self.b * (self.layers * self.block.padded + self.root.padded - in_training) // setup.shards
        self.masters = FP32 * (in_training + self.score) // setup.shards
        self.stored = self.frozen + self.masters
        # Blocks whose weights wait for the next micro-batch.
        self.stay = 0 if setup.reshard_after_forward or setup.micro_batches == 1 else self.layers
        self.of_down_proj = unit_of((shape for name, shape in trained.items() if name.startswith(_LAST)), setup).size

    def moments(self) -> tuple[Moment, ...]:
        # Without FSDP gradients are added up in fp32, which autograd makes of what ops give in 16 bits.
        is_widened = not self.setup.is_wrapped and self.b < FP32
        in_blocks: list[Moment] = []
        for layer in reversed(range(self.layers)):
            in_blocks.append(self._block_backward(layer))
            if self.setup.fp8:
                in_blocks.append(self._block_products(layer))
                if is_widened:
                    in_blocks.append(self._block_widened(layer))
            if self.setup.is_wrapped:
                in_blocks.append(self._block_reduction(layer))
        in_root = [self._embedding_backward()] if self.is_embedding_trained else []
        if is_widened and self.is_embedding_trained:
            in_root.append(self._embedding_widened())
        if self.setup.is_wrapped and self.trained_root.size:
            in_root.append(self._root_reduction())
        update = Moment("optimizer update", self.stored, self.masters, 2 * self.masters)
        at_head = [self._loss(), self._loss_backward()]
        if is_widened and self.head.gradient:
            at_head.append(self._head_widened())
        return (*at_head, *in_blocks, *in_root, update)

    # The moments of a step, in order.

    def _loss(self) -> Moment:
        """The last chunk of the cross-entropy, when the forward pass has kept all it keeps."""
        is_fetched = self.setup.shards > 1 and not self.stay
        late_buffer = self.b * self.block.padded if is_fetched else 0  # of the last block's gather
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

    def _head_widened(self) -> Moment:
        """The head's gradient in 16 bits and in fp32, when its op is done."""
        before = self._loss_backward()
        gradients = before.gradients + FP32 * self.head.gradient // self.b
        # Cross-entropy has multiplied gradients that it kept; of log-probabilities the work is gone.
        head = before.head if self.setup.loss == "cross_entropy" else self.stream
        return replace(before, name="gradient of the head in fp32", gradients=gradients, head=head)

    def _block_backward(self, layer: int) -> Moment:
        """The gradient of a block's activation function, when what the block keeps is all there."""
        is_first = layer == self.layers - 1
        return self._moment(
            f"backward of block {layer}",
            weights=self._gathered_in_backward(layer) + (0 if self.stay else self._gathered_once()),
            gradients=self._finished(layer + 1) + self._unreduced(is_first) + self._of_down_proj(),
            activations=self._kept(layer) + self.tensors.at_work(is_first=layer == 0),
        )

    def _block_products(self, layer: int) -> Moment:
        """The product of a block with the largest gradient, when there are 8-bit copies of it."""
        before = self._block_backward(layer)
        activations = before.activations - self.tensors.at_work(layer == 0) + self.tensors.in_8_bits(layer == 0)
        return replace(before, name=f"8-bit products of block {layer}", activations=activations)

    def _block_widened(self, layer: int) -> Moment:
        """That gradient in 16 bits and in fp32, when the product is done."""
        before = self._block_backward(layer)
        activations = before.activations - self.tensors.at_work(layer == 0) + self.tensors.widened(layer == 0)
        return replace(before, name=f"gradient of block {layer}'s gates in fp32", activations=activations)

    def _block_reduction(self, layer: int) -> Moment:
        """A block's gradients are summed over ranks."""
        return self._moment(
            f"reduction of block {layer}",
            weights=self._gathered_in_backward(layer),
            gradients=self._finished(layer + 1) + self.head.gradient + self._in_reduction(self.trained_block),
            activations=self._kept(layer) + (self.stream if layer or self.tensors.is_input_reached else 0),
        )

    def _embedding_backward(self) -> Moment:
        """The embedding's gradient, beside the head's: with tied weights they are added once both are there."""
        return self._moment(
            "backward of the embedding",
            weights=self._gathered(self.stay),
            gradients=self._finished(0) + self._unreduced(is_first=False) + self.b * self.matrix,
            activations=self.stream,
        )

    def _embedding_widened(self) -> Moment:
        """The embedding's gradient in 16 bits and in fp32, when its op is done."""
        before = self._embedding_backward()
        gradients = before.gradients + FP32 * self.matrix
        return replace(before, name="gradient of the embedding in fp32", gradients=gradients)

    def _root_reduction(self) -> Moment:
        """The gradients of embedding, final norm and head are summed over ranks."""
        return self._moment(
            "reduction of the root",
            weights=self._gathered(self.stay) if self.stay else 0,
            gradients=self._finished(0) + self._in_reduction(self.trained_root),
        )

    def _moment(self, name: str, *, weights: int, gradients: int = 0, activations: int = 0, head: int = 0) -> Moment:
        """Adds what is there at every moment."""
        config, setup = self.config, self.setup
        tables = 2 * config.rope_length * (config.head_dim // 2) * FP32  # cosines and sines
        pack = 3 * setup.tokens_per_pack * INT64  # tokens, positions, targets
        optimizer = 0 if self.is_frozen else 2 * self.masters
        return Moment(name, self.stored + weights, gradients, optimizer, activations + tables + pack, head)

    # The moments of a forward pass that nothing is kept of.

    def reading(self) -> tuple[Moment, ...]:
        # A model in training may be told to leave its blocks gathered; a frozen one never is.
        kept_gathered = 0 if self.setup.reshard_after_forward or self.is_frozen else self.layers
        late_buffer = self.b * self.block.padded if self.setup.shards > 1 else 0  # of a gather, until the next
        gathered = self._gathered(kept_gathered or 1)
        block = self._moment("block", weights=gathered + late_buffer, activations=self.tensors.reading())
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
            return self._gathered(self.stay or layer)
        return self._gathered(1 if self.setup.shards > 1 and layer > 0 else 0)

    # Gradients.

    def _of_earlier_packs(self) -> int:
        """From the step's earlier micro-batches: all gradients, and the last unit's buffer, which FSDP lets go late."""
        if self.setup.micro_batches == 1:
            return 0
        is_reduced = self.setup.is_wrapped and self.setup.shards > 1
        return self.masters + (FP32 * self._last_reduced() if is_reduced else 0)

    def _last_reduced(self) -> int:
        """Entries of the unit whose gradients are reduced last: the root's, or the first block's."""
        return self.trained_root.padded or self.trained_block.padded

    def _finished(self, layer: int) -> int:
        """Reduced gradients of the blocks from a layer on, or of everything from earlier micro-batches."""
        if self.setup.micro_batches > 1:
            return self.masters
        return FP32 * (self.layers - layer) * self.trained_block.padded // self.setup.shards

    def _unreduced(self, is_first: bool) -> int:
        """The head's gradient waits for the root's reduction; a reduced unit's buffer waits for the next unit."""
        if not self.setup.is_wrapped:
            # There before the others; that of a tied head is added to earlier ones when the embedding's is there, too.
            waits = self.config.tie_word_embeddings and self.is_embedding_trained
            return FP32 * self.head.gradient // self.b if waits or self.setup.micro_batches == 1 else 0
        buffer = FP32 * self.trained_block.padded
        if is_first:
            is_late = self.setup.micro_batches > 1 and self.setup.shards > 1
            buffer = FP32 * (self.score or (self._last_reduced() if is_late else 0))
        return self.head.gradient + buffer

    def _of_down_proj(self) -> int:
        """The one product of a block whose gradients are there before the activation function's."""
        if self.setup.is_wrapped:
            return self.b * self.of_down_proj
        # In one process they are fp32 from the first, and those of an earlier pack are added to.
        return FP32 * self.of_down_proj if self.setup.micro_batches == 1 else 0

    def _in_reduction(self, unit: Unit) -> int:
        """A unit's gradients go into an fp32 buffer, and that into this rank's part; FSDP forgets to drop the last.

        Without shards those of several micro-batches are fp32 already, and what was theirs is this rank's part.
        """
        if self.setup.shards == 1 and self.setup.micro_batches > 1:
            return FP32 * unit.padded
        forgotten = self.b * unit.last if self.setup.shards > 1 else 0
        return FP32 * unit.padded + max(self.b * unit.size, FP32 * unit.padded // self.setup.shards + forgotten)

    # Activations.

    def _kept(self, blocks: int) -> int:
        """What the first blocks keep for their backward pass."""
        return self.tensors.kept(is_first=True) + (blocks - 1) * self.tensors.kept(is_first=False) if blocks else 0

    def _kept_by_final_norm(self) -> int:
        return self.stream + FP32 * self.setup.tokens_per_pack
