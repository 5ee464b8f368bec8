"""Adapters against the dense model whose weights are W + s B A, and what is frozen beside them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, parameter_shapes, projections
from model.heads import CausalLM, ScalarModel
from model.init import initial_value
from model.lora import TARGETS, LoraSpec, adapters_off, add_lora, flops_per_token, lora_shapes, merged
from tests.model.tiny import CONFIGS, LLAMA, batch, causal_lm, logits

SPEC = LoraSpec(rank=4, alpha=6.0)
SPECS = {
    "all projections": SPEC,
    "queries and values": replace(SPEC, targets=("q_proj", "v_proj")),
    "keys, up and down": replace(SPEC, targets=("k_proj", "up_proj", "down_proj")),
    "rsLoRA": replace(SPEC, rslora=True),
}
BATCH = batch([17, 1, 9])


def adapted(config: ModelConfig, spec: LoraSpec, is_trained: bool = True) -> CausalLM:
    """The model with initial weights and adapters; trained ones differ from nothing."""
    model = CausalLM(config)
    add_lora(model, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(config, name, tuple(parameter.shape), 0)
            if name.endswith("lora_b") and is_trained:
                value = (
                    torch.randn(value.shape, generator=torch.Generator().manual_seed(7 + int(name.split(".")[2]))) / 50
                )
            parameter.copy_(value)
    return model


def dense(config: ModelConfig, model: Any, spec: LoraSpec) -> Any:
    """The same function without adapters, by arithmetic of its own: in float64, projection by projection."""
    parameters = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    scale = spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)
    made = type(model)(config).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parts = projections(config).get(name.split(".")[-2], {})
            weight, begin, number, row = parameters[name].clone(), 0, 0, 0
            for part, rows in parts.items() if name.endswith("weight") else ():
                if part in spec.targets:
                    a = parameters[name.replace("weight", "lora_a")][number * spec.rank : (number + 1) * spec.rank]
                    b = parameters[name.replace("weight", "lora_b")][row : row + rows]
                    weight[begin : begin + rows] += scale * b @ a
                    number, row = number + 1, row + rows
                begin += rows
            parameter.copy_(weight)
    return made


def loss_of(model: CausalLM) -> Tensor:
    return model(BATCH, cross_entropy=True).nll_sum


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To a millionth of its size, and in float64 to the square of that."""
    allowed = 1e-6 if found.dtype == torch.float32 else 1e-12
    assert (found.double() - expected.double()).norm() <= allowed * expected.double().norm()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients_are_those_of_the_dense_model(dtype: torch.dtype, kind: str, spec: LoraSpec) -> None:
    """With W' = W + s B A the chain rule gives dA = s B^T dW' and dB = s dW' A^T, part by part."""
    config = CONFIGS[kind]
    model = adapted(config, spec).to(dtype)
    whole = dense(config, model, spec)
    ours, theirs = loss_of(model), loss_of(whole)
    assert_close(ours.detach(), theirs.detach())
    ours.backward()
    theirs.backward()
    check_gradients(model, whole, spec)


def check_gradients(model: Any, whole: Any, spec: LoraSpec) -> None:
    """Those of a model with adapters against those of `dense`."""
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        gradient = whole.get_parameter(f"{path}.weight").grad
        if kind == "weight":
            assert_close(parameter.grad, gradient)
            continue
        module = model.get_submodule(path)
        parts = projections(model.config)[path.rpartition(".")[2]]
        of_parts = dict(zip(parts, gradient.double().split(list(parts.values())), strict=True))
        present = [part for part in parts if part in spec.targets]
        a = dict(zip(present, module.lora_a.detach().double().split(spec.rank), strict=True))
        b = dict(zip(present, module.lora_b.detach().double().split([parts[part] for part in present]), strict=True))
        if kind == "lora_a":
            expected = torch.cat([spec.scale * b[part].t() @ of_parts[part] for part in present])
        else:
            expected = torch.cat([spec.scale * of_parts[part] @ a[part].t() for part in present])
        assert_close(parameter.grad, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_fresh_adapters_change_nothing(kind: str) -> None:
    config = CONFIGS[kind]
    assert torch.equal(logits(adapted(config, SPEC, is_trained=False), BATCH), logits(causal_lm(config), BATCH))


def test_with_adapters_off_the_model_is_its_base_bit_by_bit_and_itself_again_afterwards() -> None:
    model, base = adapted(LLAMA, SPEC), causal_lm(LLAMA)
    before = logits(model, BATCH)
    with pytest.raises(KeyError), adapters_off(model):
        assert torch.equal(logits(model, BATCH), logits(base, BATCH))
        with adapters_off(model):
            pass
        assert torch.equal(logits(model, BATCH), logits(base, BATCH)), "the outer context holds on"
        raise KeyError
    assert torch.equal(logits(model, BATCH), before) and not torch.equal(before, logits(base, BATCH))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied"])
def test_merged_weights_give_the_same_logits(kind: str, spec: LoraSpec) -> None:
    config = CONFIGS[kind]
    model = adapted(config, spec)
    weights = dict(merged(((name, p.detach()) for name, p in model.named_parameters()), config, spec))
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == parameter_shapes(config)
    assert list(weights) == list(parameter_shapes(config))
    made = CausalLM(config)
    made.load_state_dict(weights)
    assert_close(logits(made, BATCH), logits(model, BATCH))


def test_weights_in_bf16_are_merged_in_fp32_and_rounded_once() -> None:
    model = adapted(LLAMA, SPEC)
    named = [
        (name, p.detach().bfloat16() if "lora" not in name else p.detach()) for name, p in model.named_parameters()
    ]
    weights = dict(merged(iter(named), LLAMA, SPEC))
    given = dict(named)
    path = "model.layers.1.mlp.down_proj"
    exact = given[f"{path}.weight"].double() + SPEC.scale * (
        given[f"{path}.lora_b"].double() @ given[f"{path}.lora_a"].double()
    )
    assert weights[f"{path}.weight"].dtype == torch.bfloat16
    # Of a number in [1, 2) the last place of bf16 is 2^-7; half of it is what one rounding may be off by.
    off = (weights[f"{path}.weight"].double() - exact).abs() / exact.abs()
    assert off.max() <= 2**-8 * (1 + 1e-3)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_have_the_names_and_shapes_that_are_promised(kind: str, spec: LoraSpec) -> None:
    config = CONFIGS[kind]
    with torch.device("meta"):
        model = CausalLM(config)
    add_lora(model, spec)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if "lora_" in name}
    assert found == lora_shapes(config, spec) and list(found) == list(lora_shapes(config, spec))


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_are_trained_and_modules_that_are_named_and_nothing_else() -> None:
    adapters = set(lora_shapes(LLAMA, SPEC))
    for trained, whole in (((), set()), (("embed_tokens", "lm_head"), {"model.embed_tokens.weight", "lm_head.weight"})):
        model = CausalLM(LLAMA)
        add_lora(model, replace(SPEC, trained=(*trained, "score")))
        assert trained_names(model) == adapters | whole
    scorer = ScalarModel(replace(LLAMA, head="score"))
    add_lora(scorer, replace(SPEC, trained=("score",)))
    assert trained_names(scorer) == adapters | {"score.weight"}


def test_a_is_uniform_within_one_over_the_root_of_its_inputs_and_b_is_zero() -> None:
    """peft's: Kaiming's uniform with a = sqrt(5), whose bound is sqrt(6 / (1 + 5) / in)."""
    a = initial_value(LLAMA, "model.layers.0.mlp.down_proj.lora_a", (64, 400), 0)
    bound = 1 / math.sqrt(400)
    assert a.abs().max() <= bound and a.abs().max() > 0.999 * bound
    # Of U(-1, 1) the variance is 1/3, and that of a square 4/45; five standard errors.
    assert abs((a / bound).square().mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / a.numel())
    assert torch.equal(a, initial_value(LLAMA, "model.layers.0.mlp.down_proj.lora_a", (64, 400), 0))
    assert not torch.equal(a, initial_value(LLAMA, "model.layers.1.mlp.down_proj.lora_a", (64, 400), 0))
    assert not torch.equal(a, initial_value(LLAMA, "model.layers.0.mlp.down_proj.lora_a", (64, 400), 1))
    assert not initial_value(LLAMA, "model.layers.0.mlp.down_proj.lora_b", (48, 64), 0).any()


def test_a_token_costs_no_gradient_of_frozen_matrices_and_six_operations_an_adapter_weight() -> None:
    frozen, adapters = LLAMA.num_matmul_parameters, sum(math.prod(s) for s in lora_shapes(LLAMA, SPEC).values())
    attention = LLAMA.flops_per_token(32) - 6 * frozen
    assert flops_per_token(LLAMA, None, 32) == LLAMA.flops_per_token(32)
    assert flops_per_token(LLAMA, SPEC, 32) == 4 * frozen + 6 * adapters + attention
    words = replace(SPEC, trained=("embed_tokens", "lm_head"))
    head = LLAMA.vocab_size * LLAMA.hidden_size
    assert flops_per_token(LLAMA, words, 32) == 4 * frozen + 2 * head + 6 * adapters + attention


def dropout_model(seed: int = 0) -> CausalLM:
    spec = replace(SPEC, dropout=0.5)
    model = CausalLM(LLAMA)
    add_lora(model, spec, seed)
    source = adapted(LLAMA, SPEC)
    model.load_state_dict(source.state_dict())
    return model


def test_dropout_is_of_gradients_passes_alone_and_a_function_of_seed_and_pack() -> None:
    model, plain = dropout_model(), adapted(LLAMA, SPEC)
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(plain))
    first = loss_of(model).detach()
    torch.rand(3)
    assert torch.equal(loss_of(model), first) and torch.equal(loss_of(dropout_model()), first)
    assert not torch.equal(first, loss_of(plain))
    assert not torch.equal(first, loss_of(dropout_model(seed=1)))
    other = model(replace(BATCH, index=1), cross_entropy=True).nll_sum
    assert not torch.equal(first, other)


def test_every_adapter_drops_inputs_of_its_own() -> None:
    model = dropout_model()
    loss_of(model)
    seeds = [int(m.low_rank.seed) for m in model.modules() if getattr(m, "low_rank", None) is not None]
    assert len(set(seeds)) == len(seeds) == LLAMA.num_layers * len(projections(LLAMA))
    assert set(TARGETS) == {part for parts in projections(LLAMA).values() for part in parts}
