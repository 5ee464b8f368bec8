"""Training with 8-bit products: its loss beside that without, what it leaves alone, what it holds, whom it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from engine import fp8 as module
from engine.fp8 import check_fp8, use_fp8
from engine.lora import LoraConfig
from engine.memory import Setup, plan
from engine.mesh import Runtime
from engine.recompute import Recompute, _is_costly
from engine.sft import SftConfig, SftTrainConfig
from kernels.backend import Chip, observed_launches
from kernels.fp8_linear import _bwd_triton
from model.config import PRESETS
from model.errors import InputError
from model.heads import CausalLM, ScalarModel
from model.layers import Linear
from tests.engine import fp8_parity as parity
from tests.engine.live_bytes import LiveBytes
from tests.engine.test_memory import SLACK, SMALL, sharded, summed_loss, without_optimizer
from tests.kernels.oracle import random

STEPS = 40


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    with parity.one_process() as made:
        yield made


@pytest.mark.parametrize("stage", ["pretraining", "sft", "reward"])
def test_the_loss_is_that_of_bf16_to_a_fraction_of_what_another_seed_changes(
    stage: parity.StageName, runtime: Runtime
) -> None:
    """What the format costs must be lost in what nobody would call a difference: other weights and batches.

    The mean loss of the last quarter of the steps, and the held-out loss, may differ by a tenth of what single steps of
    two seeds differ by; and step by step, on the same batch, the two runs stay within a tenth of it as well. A reward
    model's batch is four comparisons: its held-out loss may differ by what chance leaves in a mean of so many batches.
    """
    one, two = (parity.base_of(stage, STEPS, runtime, seed) for seed in (0, 1))
    untrained = parity.train(0, runtime, fp8=False, stage=stage, base=one).held_out
    base, base_held_out, _ = parity.train(STEPS, runtime, fp8=False, stage=stage, base=one)
    ours, held_out, _ = parity.train(STEPS, runtime, fp8=True, stage=stage, base=one)
    other, _, _ = parity.train(STEPS, runtime, fp8=False, stage=stage, base=two, seed=1)
    late = slice(-STEPS // 4, None)
    assert base_held_out < untrained  # it learns
    assert stage != "pretraining" or base[late].mean() < 0.75 * base[0]
    noise = (other - base)[late].abs().mean()
    assert 0 < (ours - base)[late].abs().mean() < noise / 10
    assert (ours[late].mean() - base[late].mean()).abs() < noise / 10
    assert abs(held_out - base_held_out) < noise / (math.sqrt(parity.LOOKS) if stage == "reward" else 10)


def test_recomputing_changes_no_loss(runtime: Runtime) -> None:
    kept = parity.train(3, runtime, fp8=True).losses
    modes: tuple[Recompute, ...] = ("selective", "full")
    for mode in modes:
        assert torch.equal(parity.train(3, runtime, fp8=True, recompute=mode).losses, kept)


def test_blocks_multiply_in_8_bits_and_nothing_else_does() -> None:
    for root in (CausalLM, ScalarModel):
        with torch.device("meta"):
            model = root(replace(SMALL, head="lm" if root is CausalLM else "score"))
        use_fp8(model, torch.device("cpu"))
        told = {name for name, part in model.named_modules() if getattr(part, "is_fp8", False)}
        parts = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
        assert told == {f"model.layers.{layer}.{part}" for layer in range(SMALL.num_layers) for part in parts}


def test_parameters_are_what_they_are_without_so_checkpoints_are_too() -> None:
    with torch.device("meta"):
        plain, ours = CausalLM(SMALL), CausalLM(SMALL)
    use_fp8(ours, torch.device("cpu"))
    assert {name: (p.shape, p.dtype) for name, p in ours.state_dict().items()} == {
        name: (p.shape, p.dtype) for name, p in plain.state_dict().items()
    }


def test_the_product_is_worth_keeping_and_its_backward_is_no_product_of_the_forward() -> None:
    assert _is_costly(torch.ops.chimed.fp8_linear.default)
    assert not _is_costly(torch.ops.chimed.fp8_linear_bwd.default)


def test_a_graph_holds_the_product_and_gives_its_bits() -> None:
    layer = Linear(32, 48, bias=True)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = random(*parameter.shape, seed=seed)
    x, dy = random(20, 32, seed=3), random(20, 48, seed=4)

    def run(forward: nn.Module) -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        return y, *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)

    plain = run(layer)
    layer.is_fp8 = True
    ours = run(layer)
    traced = run(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert not torch.equal(ours[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(ours, traced, strict=True))


def held_by_product(setup: Setup) -> tuple[int, int]:
    """Bytes of the backward of gates and ups: at its peak, beside what it is given; and of its results."""
    out, width, tokens = 2 * SMALL.intermediate_size, SMALL.hidden_size, setup.tokens_per_pack
    with observed_launches(lambda *_: None, Chip(90, 132)), torch.device("meta"), LiveBytes() as live:
        shapes = (tokens, out), (tokens, width), (out, width)
        arguments = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        largest = torch.empty(()), torch.empty(())
        given = live.total()
        results = _bwd_triton(*arguments, *largest)
        return live.peak() - given, sum(result.nbytes for result in results)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("tokens", [512, 64])  # the copies of most gradients, and of most weights
def test_the_plan_knows_what_copies_hold(tokens: int, recompute: Recompute) -> None:
    setup = Setup(tokens, 64, world=8, recompute=recompute, fp8=True)
    with sharded(SMALL, setup) as (model, pack, live):
        use_fp8(model, torch.device("cpu"))
        (summed_loss(model, pack, setup) / tokens).backward()
    peak, results = held_by_product(setup)
    counted = [total - results + peak for total in live.after("chimed.fp8_linear_bwd.default")[1::4]]
    moments = {moment.name: moment for moment in plan(SMALL, setup).moments}
    planned = [moments[f"8-bit products of block {layer}"] for layer in reversed(range(SMALL.num_layers))]
    assert [without_optimizer(moment) for moment in planned] == pytest.approx(counted, rel=SLACK)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_plan_knows_that_one_process_widens_gradients(recompute: Recompute) -> None:
    config = replace(SMALL, vocab_size=16, intermediate_size=1280)
    setup = Setup(128, 64, recompute=recompute, micro_batches=2, fp8=True)
    with sharded(config, setup) as (model, pack, live):
        use_fp8(model, torch.device("cpu"))
        for _ in range(setup.micro_batches):
            live.log.clear()
            (summed_loss(model, pack, setup) / setup.tokens_per_pack).backward()
    # Of a block's four products the gates' is the second; then autograd makes a copy of its weight's gradient.
    products = [at for at, (name, _) in enumerate(live.log) if name == "chimed.fp8_linear_bwd.default"][1::4]
    counted = [next(total for name, total in live.log[at:] if name == "aten._to_copy.default") for at in products]
    moments = {moment.name: moment for moment in plan(config, setup).moments}
    planned = [moments[f"gradient of block {layer}'s gates in fp32"] for layer in reversed(range(SMALL.num_layers))]
    assert [without_optimizer(moment) for moment in planned] == pytest.approx(counted, rel=SLACK)


def test_what_is_kept_is_what_is_kept_without() -> None:
    kept = [plan(PRESETS["7b"], Setup(8192, 4096, world=8, fp8=fp8)).moments[0] for fp8 in (False, True)]
    assert kept[0] == kept[1]


def test_sizes_that_are_no_multiples_of_16_are_refused_with_the_first_of_them() -> None:
    for preset in PRESETS.values():
        check_fp8(preset)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate_up_proj\.weight is 600 x 128.* multiples of 16"):
        check_fp8(replace(SMALL, intermediate_size=300))


def test_a_gpu_without_8_bit_products_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_fp8", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    with pytest.raises(InputError, match=r"--train.fp8: NVIDIA A100-SXM4-80GB has no 8-bit products"):
        use_fp8(nn.Module(), torch.device("cuda", 0))


def test_adapters_are_refused() -> None:
    train = SftTrainConfig(fp8=True)
    SftConfig(train=train).check()
    with pytest.raises(InputError, match=r"--train.fp8 trains all weights"):
        SftConfig(train=train, lora=LoraConfig(rank=8)).check()
