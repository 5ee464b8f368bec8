"""What a block keeps for its backward pass, tensor by tensor, by recompute mode; and that no number depends on it."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

import kernels.attention  # noqa: F401  registers the ops
from engine.memory_blocks import BlockTensors
from engine.memory_setup import Setup
from engine.recompute import _COSTLY, Recompute, _keep_the_costly, apply_recompute
from engine.shard import Precision
from model.batch import Layout
from model.config import ModelConfig
from model.heads import CausalLM
from model.layers import Linear
from model.lora import LoraSpec, add_lora
from tests.engine.live_bytes import LiveBytes

T = 64
LLAMA = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=80,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
QWEN3 = replace(LLAMA, model_type="qwen3", qk_norm=True, head_dim=16)
QWEN2 = replace(LLAMA, model_type="qwen2", attention_bias=True)
LORA = LoraSpec(rank=4, alpha=8.0)

# Numbers a token: width, all queries, all keys, feed-forward width, heads of queries.
D, Q, K, F, H = 32, 32, 16, 80, 4
# What a block keeps, beside what it is given, in the order in which it is made: the op and numbers of 2 bytes a token,
# or of 4 where they are statistics.
NONE = [
    ("rms_norm", D),
    ("rms_norm's statistics", 1),
    ("split_rotary", Q),
    ("split_rotary", K),
    ("split_rotary", K),
    ("attention", Q),
    ("attention's statistics", H),
    ("add_rms_norm", D),
    ("add_rms_norm", D),  # the sum
    ("add_rms_norm's statistics", 1),
    ("mm", 2 * F),
    ("swiglu", F),
]
SELECTIVE = [
    ("rms_norm's statistics", 1),
    ("split_rotary", Q),
    ("split_rotary", K),
    ("split_rotary", K),
    ("attention", Q),
    ("attention's statistics", H),
    ("add_rms_norm", D),
    ("add_rms_norm's statistics", 1),
    ("mm", 2 * F),
]
SELECTIVE_QWEN3 = [
    ("rms_norm's statistics", 1),
    ("mm", 2 * (Q + 2 * K)),
    ("rms_norm's statistics", H),
    ("rms_norm's statistics", H // 2),
    ("attention", 2 * Q),
    ("attention's statistics", H),
    ("add_rms_norm", D),
    ("add_rms_norm's statistics", 1),
    ("mm", 2 * F),
]


class OneBlock:
    """The block of a model with random weights, and all that it reads but the stream."""

    def __init__(
        self, config: ModelConfig, mode: Recompute, dtype: torch.dtype = torch.bfloat16, lora: LoraSpec | None = None
    ) -> None:
        torch.manual_seed(0)
        model = CausalLM(config)
        if lora is not None:
            add_lora(model, lora)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        seed = torch.tensor(5)
        for module in model.modules():
            if isinstance(module, Linear) and module.low_rank is not None:
                module.low_rank.seed = seed
        model.to(dtype)
        apply_recompute(model.model.layers, mode)
        self.block = model.model.layers[0]
        self.hidden = torch.randn(T, config.hidden_size, dtype=dtype)
        bounds = torch.tensor([0, 40, T], dtype=torch.int32)
        rotation = model.model.rotary(torch.arange(T))
        self.rest = rotation, Layout(bounds, bounds, T, T)
        self.given = [self.hidden, *vars(rotation).values(), bounds, seed, *self.block.parameters()]

    def run(self, is_reached: bool = True) -> Tensor:
        """is_reached: a gradient is asked for of what the block is given."""
        return self.block(self.hidden.requires_grad_(is_reached), *self.rest)

    def kept(self, is_reached: bool = True) -> list[tuple[str, int]]:
        """(op, bytes) of all that a forward pass leaves behind for the backward."""
        with LiveBytes() as live:
            for tensor in self.given:
                live.add(tensor, "given")
            out = self.run(is_reached)
            result = out.untyped_storage()._cdata
            left = [(live.makers[address], size) for address, size in live.alive().items() if address != result]
        return [(op.split(".")[1], size) for op, size in left if op != "given"]


def in_bytes(numbers: list[tuple[str, int]]) -> list[tuple[str, int]]:
    suffix = "'s statistics"
    return [(op.removesuffix(suffix), T * number * (4 if op.endswith(suffix) else 2)) for op, number in numbers]


def test_what_a_block_keeps_is_what_is_listed_here() -> None:
    assert OneBlock(LLAMA, "none").kept() == in_bytes(NONE)


def test_selective_recomputation_keeps_no_norm_and_no_activation() -> None:
    assert OneBlock(LLAMA, "selective").kept() == in_bytes(SELECTIVE)


def test_selective_recomputation_turns_normed_queries_and_keys_again() -> None:
    assert OneBlock(QWEN3, "selective").kept() == in_bytes(SELECTIVE_QWEN3)


SPECS = {
    "all weights": None,
    "adapters": LORA,
    "adapters with dropout": replace(LORA, dropout=0.3),
    "adapters of queries": replace(LORA, targets=("q_proj",)),
    "adapters of the last product": replace(LORA, targets=("down_proj",)),
    "adapters of outputs with dropout": replace(LORA, targets=("o_proj", "down_proj"), dropout=0.3),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_first_and_later_blocks_keep_what_is_planned(
    mode: Recompute, precision: Precision, config: ModelConfig, spec: LoraSpec | None
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    planned = BlockTensors(config, Setup(T, T, precision=precision, recompute=mode, lora=spec))
    stream = planned.bytes["input"]
    for is_first in (True, False):
        is_reached = planned.is_input_reached or not is_first
        kept = OneBlock(config, mode, dtype, spec).kept(is_reached)
        assert sum(size for _, size in kept) == planned.kept(is_first) - (stream if is_reached else 0), is_first


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("config", [LLAMA, QWEN3, QWEN2], ids=["llama", "qwen3", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_selective_recomputation_changes_no_bit_of_a_gradient(
    dtype: torch.dtype, config: ModelConfig, spec: LoraSpec | None
) -> None:
    def gradients(mode: Recompute) -> list[Tensor]:
        made = OneBlock(config, mode, dtype, spec)
        out = made.run()
        trained = [parameter for parameter in made.block.parameters() if parameter.requires_grad]
        return [out, *torch.autograd.grad(out.square().sum(), [made.hidden, *trained])]

    for kept, recomputed in zip(gradients("none"), gradients("selective"), strict=True):
        assert kept.isfinite().all() and torch.equal(kept, recomputed)


def kept_by_a_compiled_block(mode: Recompute) -> int:
    """Bytes that a graph of torch.compile saves for its backward, without parameters and what the block is given."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = OneBlock(LLAMA, "none", torch.float32)
    apply_recompute([made.block], mode, is_compiled=True)  # type: ignore[arg-type]
    made.block.forward = torch.compile(made.block.forward, fullgraph=True)
    out = made.run()
    given = {x.data_ptr() for x in made.given}
    saved = {x.data_ptr(): x.nbytes for x in out.grad_fn.saved_tensors if x.data_ptr() not in given}
    out.sum().backward()
    return sum(saved.values())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_block_keeps_less_too() -> None:
    kept, selective = kept_by_a_compiled_block("none"), kept_by_a_compiled_block("selective")
    assert kept - selective >= 4 * T * (2 * D + F)


@pytest.mark.parametrize(
    "name",
    [
        "aten::mm",
        "chimed::attention",
        "chimed::matmul_nt",
        "aten::_scaled_dot_product_flash_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
    ],
)
def test_products_and_attention_by_any_provider_are_kept(name: str) -> None:
    assert _COSTLY.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "aten::mul",
        "chimed::rms_norm",
        "chimed::attention_bwd",
        "aten::_scaled_dot_product_flash_attention_backward",
        "flash_attn::_flash_attn_varlen_backward",
        "flash_attn_3::bwd",
    ],
)
def test_what_streams_memory_or_belongs_to_the_backward_is_not(name: str) -> None:
    assert not _COSTLY.fullmatch(name)


def test_an_op_is_known_by_its_name() -> None:
    assert _keep_the_costly(None, torch.ops.chimed.attention.default) == CheckpointPolicy.MUST_SAVE
    assert _keep_the_costly(None, torch.ops.aten.mul.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE
