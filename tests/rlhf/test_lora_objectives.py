"""What adapters learn from comparisons, against the dense model whose weights are W + s B A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from engine.data.ranked_batch import RankedBatch
from engine.step import Loss, Objective
from model.config import ModelConfig, projections
from model.heads import CausalLM, ScalarModel
from model.init import initial_value
from model.lora import LoraSpec, adapters_off, add_lora
from rlhf.dpo import DpoLossConfig, dpo_objective, sequence_logprobs
from rlhf.reward_model import ranking_objective
from tests.model.tiny import CONFIGS
from tests.rlhf.test_dpo import ranked

SPEC = LoraSpec(rank=4, alpha=6.0, trained=("score",))
CONFIG = replace(CONFIGS["qwen2"], max_position_embeddings=96)
SCORE = replace(CONFIG, head="score")
BATCH = ranked(vocabulary=CONFIG.vocab_size)


def adapted(root: Callable[[ModelConfig], nn.Module], config: ModelConfig) -> Any:
    """A model with adapters that are not 0."""
    model = root(config)
    add_lora(model, SPEC)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            value = initial_value(config, name, tuple(parameter.shape), 0)
            if name.endswith("lora_b"):
                value = torch.randn(value.shape, generator=torch.Generator().manual_seed(number)) / 50
            parameter.copy_(value)
    return model


def dense(model: nn.Module, root: Callable[[ModelConfig], nn.Module], config: ModelConfig) -> Callable[..., Any]:
    """The model without adapters, whose weights are W + s B A: as a function, so that autograd goes on into A and B."""
    parameters = dict(model.named_parameters())
    plain, weights = root(config), {}
    for name, _ in plain.named_parameters():
        path, _, kind = name.rpartition(".")
        weights[name] = parameters[name]
        if kind == "weight" and f"{path}.lora_a" in parameters:
            parts = list(projections(config)[path.rpartition(".")[2]].values())
            pairs = zip(parameters[f"{path}.lora_b"].split(parts), parameters[f"{path}.lora_a"].split(4), strict=True)
            weights[name] = weights[name] + 6.0 / 4 * torch.cat([b @ a for b, a in pairs])
    return lambda *arguments, **options: functional_call(plain, weights, arguments, options)


def gradients(loss: Loss, model: nn.Module) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss.total, list(trained.values())), strict=True))


def assert_alike(model: nn.Module, whole: Callable[..., Any], objective: Objective[RankedBatch]) -> set[str]:
    """Loss, what is shown and gradients, to a millionth of their size. Returns the names of what is trained."""
    ours, theirs = objective(model, BATCH), objective(whole, BATCH)  # type: ignore[arg-type]
    assert ours.count == theirs.count
    found, expected = gradients(ours, model), gradients(theirs, model)
    pairs = [(ours.total.detach(), theirs.total.detach()), *((found[name], expected[name]) for name in found)]
    for one, other in pairs:
        assert other.any() and (one - other).norm() <= 1e-6 * other.norm()
    return set(found)


@pytest.mark.parametrize("kind", ["pairwise", "plackett_luce", "best"])
def test_a_reward_model_of_adapters_learns_as_the_dense_model_does(kind: Any) -> None:
    model = adapted(ScalarModel, SCORE)
    trained = assert_alike(model, dense(model, ScalarModel, SCORE), ranking_objective(kind, 0.5, 0.01))
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b", "weight"}
    assert {name for name in trained if name.endswith("weight")} == {"score.weight"}


@pytest.mark.parametrize("per_token", [False, True])
def test_dpo_of_adapters_learns_as_the_dense_model_does_from_its_base(per_token: bool) -> None:
    model = adapted(CausalLM, CONFIG)
    base = CausalLM(CONFIG)
    base.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad(), adapters_off(model):
        reference = sequence_logprobs(model, BATCH, per_token)
    assert torch.equal(reference, sequence_logprobs(base, BATCH, per_token))
    objective = dpo_objective(DpoLossConfig(per_token=per_token, label_smoothing=0.1), reference)
    trained = assert_alike(model, dense(model, CausalLM, CONFIG), objective)
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b"}
