"""The decoder over packs: isolation, packing, recomputation of tables, meta initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import backend
from model.batch import IGNORE, PackedBatch
from model.config import ModelConfig, parameter_shapes
from model.heads import CausalLM, ScalarModel
from model.rope import rotary_tables
from tests.model.tiny import CONFIGS, LLAMA, batch, causal_lm, documents, fill, logits

every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
LENGTHS = (20, 33, 11)


@every_kind
def test_changing_a_document_leaves_the_others_bitwise_alone(config: ModelConfig) -> None:
    """Done-when 8."""
    model = causal_lm(config)
    pack = batch(LENGTHS)
    other = replace(pack, tokens=pack.tokens.clone(), targets=pack.targets.clone())
    other.tokens[20:53] = other.tokens[20:53].flip(0)
    other.targets[20:40] = IGNORE
    with torch.no_grad():
        before, after = logits(model, pack), logits(model, other)
        assert torch.equal(before[:20], after[:20]) and torch.equal(before[53:], after[53:])
        assert not torch.equal(before[20:53], after[20:53])


@every_kind
def test_a_pack_gives_what_its_documents_give_one_by_one(config: ModelConfig) -> None:
    model = causal_lm(config)
    pack = batch(LENGTHS)
    nll = model(pack, cross_entropy=True).nll_sum
    nll.backward()
    packed = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    alone = [model(document, cross_entropy=True).nll_sum for document in documents(pack)]
    torch.stack(alone).sum().backward()
    assert torch.allclose(nll, torch.stack(alone).sum(), rtol=1e-6)
    for one, parameter in zip(packed, model.parameters(), strict=True):
        assert parameter.grad is not None
        assert (one - parameter.grad).abs().max() <= 1e-5 * one.abs().max()


def test_the_tail_and_empty_documents_are_harmless() -> None:
    model = causal_lm(LLAMA)
    pack = batch([20, 12])
    padded = PackedBatch(
        tokens=torch.cat([pack.tokens, torch.zeros(8, dtype=torch.int64)]),
        positions=torch.cat([pack.positions, torch.arange(8)]),
        cu_seqlens=torch.tensor([0, 20, 32, 40, 40, 40], dtype=torch.int32),
        targets=torch.cat([pack.targets, torch.full((8,), IGNORE)]),
        num_documents=2,
        max_seqlen=64,
    )
    assert torch.allclose(model(pack, cross_entropy=True).nll_sum, model(padded, cross_entropy=True).nll_sum, rtol=1e-6)


def test_every_parameter_has_a_gradient_even_without_targets() -> None:
    """Sharded training wants every parameter used in every micro-batch."""
    for config in CONFIGS.values():
        model = causal_lm(config)
        pack = batch(LENGTHS)
        empty = replace(pack, targets=torch.full_like(pack.targets, IGNORE))
        model(empty, cross_entropy=True).nll_sum.backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_token_log_probabilities_are_those_of_the_logits() -> None:
    model = causal_lm(LLAMA)
    pack = batch(LENGTHS)
    counted = pack.targets != IGNORE
    with torch.no_grad():
        expected = (logits(model, pack) / 0.7).log_softmax(dim=-1)[counted]
        told = model(pack, 0.7, with_entropy=True)
    assert torch.allclose(told.logprob[counted], expected.gather(1, pack.targets[counted, None])[:, 0], atol=1e-5)
    assert torch.allclose(told.entropy[counted], -(expected.exp() * expected).sum(dim=-1), atol=1e-5)
    assert not told.logprob[~counted].any()


def test_weights_scale_each_targets_loss() -> None:
    model = causal_lm(LLAMA)
    pack = batch(LENGTHS)
    weights = torch.rand(len(pack.tokens), generator=torch.Generator().manual_seed(0))
    told = model(pack)
    weighted = model(replace(pack, weights=weights), cross_entropy=True, z_loss=0.1)
    assert torch.allclose(weighted.nll_sum, -(weights * told.logprob).sum(), rtol=1e-5)
    assert torch.allclose(weighted.z_sum, 0.1 * (weights * told.logsumexp.square()).sum(), rtol=1e-5)


def test_embedding_noise_is_added_to_the_embeddings() -> None:
    model = causal_lm(LLAMA)
    pack = batch(LENGTHS)
    moved = model.model.embed_tokens.weight[torch.tensor(5)] - model.model.embed_tokens.weight[pack.tokens]
    noisy = model(pack, embedding_noise=moved.detach())
    fives = model(replace(pack, tokens=torch.full_like(pack.tokens, 5)))
    assert torch.allclose(noisy.logprob, fives.logprob, atol=1e-6)


def test_a_scalar_model_says_one_fp32_number_a_token() -> None:
    config = replace(LLAMA, head="score")
    model = ScalarModel(config)
    fill(model, config)
    pack = batch(LENGTHS)
    value = model(pack)
    hidden = model.model(pack.tokens, pack.positions, pack.layout)
    assert value.dtype == torch.float32
    assert torch.allclose(value, (hidden @ model.score.weight.t())[:, 0], atol=1e-6)
    value.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@every_kind
def test_names_shapes_and_order_are_those_of_parameter_shapes(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = CausalLM(config)
    assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == list(parameter_shapes(config).items())
    assert list(model.state_dict()) == list(parameter_shapes(config))
    scoring = replace(config, head="score")
    with torch.device("meta"):
        scorer = ScalarModel(scoring)
    assert [(n, tuple(p.shape)) for n, p in scorer.named_parameters()] == list(parameter_shapes(scoring).items())


@pytest.mark.parametrize("name", ["llama", "dynamic", "yarn", "llama3"])
def test_rotary_tables_survive_meta_initialisation_and_casts(name: str) -> None:
    config = CONFIGS[name].with_context(48)
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu").bfloat16()
    cos, sin = rotary_tables(config)
    assert cos.shape == (48, config.head_dim // 2) and cos.dtype == torch.float32
    assert torch.equal(model.model.rotary.cos, cos) and torch.equal(model.model.rotary.sin, sin)


def test_meta_and_direct_initialisation_compute_the_same() -> None:
    with torch.device("meta"):
        model = CausalLM(LLAMA)
    model.to_empty(device="cpu")
    fill(model, LLAMA)
    pack = batch(LENGTHS)
    assert torch.equal(model(pack).logprob, causal_lm(LLAMA)(pack).logprob)


def test_a_model_in_bf16_is_as_near_to_fp32_as_its_references_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = batch(LENGTHS)
    with torch.no_grad():
        true = causal_lm(LLAMA)(pack).logprob
        ours = causal_lm(LLAMA).bfloat16()(pack).logprob
        monkeypatch.setattr(backend, "FACE", "reference")
        plain = causal_lm(LLAMA).bfloat16()(pack).logprob
    assert ours.dtype == torch.float32
    assert 0 < (ours - true).norm() <= 2 * (plain - true).norm()


def test_a_compiled_block_computes_the_same() -> None:
    """Traced whole, without the code generator, which needs a C++ compiler."""
    model = causal_lm(CONFIGS["qwen3"])
    pack = batch(LENGTHS)
    plain = model(pack, cross_entropy=True).nll_sum
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = model(pack, cross_entropy=True).nll_sum
    assert torch.allclose(plain, compiled, rtol=1e-6)
    plain.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    compiled.backward()
    for one, parameter in zip(grads, model.parameters(), strict=True):
        assert torch.allclose(one, parameter.grad, rtol=1e-4, atol=1e-6)
