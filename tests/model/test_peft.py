"""PEFT is the oracle: its adapters give its logits and its merged weights here, and ours give ours there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import ModelConfig
from model.heads import CausalLM, ScalarModel
from model.hf import hf_parameters, load_config, read_model, write_model
from model.lora import TARGETS, LoraSpec, add_lora, is_trained
from model.peft import open_adapter, read_adapter, write_adapter
from tests.model.peft_models import made_by_peft, opened_by_peft, shake
from tests.model.tiny import CONFIGS, LLAMA, batch, causal_lm, documents, fill, loaded, logits

TOLERANCE = 1e-5
PACK = batch((40, 1, 17))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What LoraConfig is told, and the projections that it means.
CHOICES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "all": ({"target_modules": list(TARGETS)}, TARGETS),
    "two, rsLoRA": ({"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, ("q_proj", "v_proj")),
    "all-linear": ({"target_modules": "all-linear"}, TARGETS),
    "a pattern": ({"target_modules": r".*\.(k_proj|up_proj)"}, ("k_proj", "up_proj")),
    "all but some": (
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "mlp.gate_proj"]},
        ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
    ),
    "by full names": (
        {"target_modules": [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]},
        ("down_proj",),
    ),
    "what PEFT takes by itself": ({}, ("q_proj", "v_proj")),
    "embedding and head": (
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        ("o_proj",),
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with torch.no_grad():
        yield


def theirs(model: Any) -> Tensor:
    """[T, V]"""
    return torch.cat([model(document.tokens[None]).logits[0] for document in documents(PACK)])


def hf_weights(directory: Path) -> dict[str, Tensor]:
    """What a directory is read as, by Hugging Face's names."""
    config = load_config(directory)
    parameters, weights = hf_parameters(config), dict[str, Tensor]()
    for name, tensor in read_model(directory, config):
        parts = parameters[name]
        weights |= dict(zip([part for part, _ in parts], tensor.split([shape[0] for _, shape in parts]), strict=True))
    return weights


def adapted(config: ModelConfig, spec: LoraSpec, seed: int = 0) -> CausalLM | ScalarModel:
    """A model with adapters, not merged, with random values in everything that is trained."""
    model = causal_lm(config, seed) if config.head == "lm" else ScalarModel(config)
    fill(model, config, seed)
    add_lora(model, spec)
    fill(model, config, seed)
    shake(model)
    return model


def trained(model: CausalLM | ScalarModel, spec: LoraSpec) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if is_trained(name, spec))


def write_both(model: CausalLM | ScalarModel, spec: LoraSpec, folder: Path) -> None:
    """A base with the model's frozen weights in `folder/base`, its adapter in `folder/adapter`."""
    frozen = causal_lm(replace(model.config, head="lm"))
    write_model(folder / "base", frozen.config, frozen.named_parameters(), torch.float32)
    write_adapter(folder / "adapter", model.config, spec, folder / "base", trained(model, spec))


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2 with a window", "qwen3"])
@pytest.mark.parametrize("choice", ["all", "two, rsLoRA"])
def test_adapters_of_peft_give_its_logits_and_its_merged_weights(kind: str, choice: str, tmp_path: Path) -> None:
    options, targets = CHOICES[choice]
    expects(made_by_peft(CONFIGS[kind], tmp_path, **options), tmp_path, targets)


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in ("all", "two, rsLoRA")])
def test_modules_are_chosen_as_peft_chooses_them(choice: str, tmp_path: Path) -> None:
    options, targets = CHOICES[choice]
    expects(made_by_peft(LLAMA, tmp_path, **options), tmp_path, targets)


def expects(oracle: Any, folder: Path, targets: tuple[str, ...]) -> None:
    assert open_adapter(folder / "adapter").spec.targets == targets
    ours = logits(loaded(folder / "adapter"), PACK)
    assert (ours - theirs(oracle)).abs().max() <= TOLERANCE
    assert (ours - logits(loaded(folder / "base"), PACK)).abs().max() > 0.01
    merged = oracle.merge_and_unload().state_dict()
    weights = hf_weights(folder / "adapter")
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)
    assert merged.keys() - weights.keys() <= {HEAD}


@pytest.mark.parametrize(
    ("said", "targets"), [("all-linear", TARGETS), ("ALL-linear", TARGETS), (None, ("q_proj", "v_proj"))]
)
def test_shorthands_mean_what_peft_takes_them_for(said: str | None, targets: tuple[str, ...], tmp_path: Path) -> None:
    """It saves names in their place; people and other programs write them."""
    made_by_peft(LLAMA, tmp_path, target_modules=list(targets))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": said}))
    expects(opened_by_peft(tmp_path / "base", tmp_path / "adapter"), tmp_path, targets)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("keeps_tie", [False, True])
def test_a_tied_embedding_is_untied_where_peft_unties_it(keeps_tie: bool, modules: list[str], tmp_path: Path) -> None:
    tie = {"modules_to_save": modules, "ensure_weight_tying": keeps_tie}
    oracle = made_by_peft(CONFIGS["tied"], tmp_path, target_modules=["v_proj"], **tie)
    assert load_config(tmp_path / "adapter").tie_word_embeddings == keeps_tie
    assert (logits(loaded(tmp_path / "adapter"), PACK) - theirs(oracle)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2 with a window", "qwen3"])
@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(4, 8.0),
        LoraSpec(3, 2.5, rslora=True, targets=("k_proj", "gate_proj")),
        LoraSpec(2, 4.0, targets=("o_proj", "up_proj"), trained=("embed_tokens", "lm_head")),
    ],
    ids=["all", "two, rsLoRA", "embedding and head"],
)
def test_adapters_of_ours_give_equal_logits_apart_merged_and_in_peft(spec: LoraSpec, kind: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[kind], spec)
    write_both(model, spec, tmp_path)
    apart, merged = logits(model, PACK), logits(loaded(tmp_path / "adapter"), PACK)
    in_peft = theirs(opened_by_peft(tmp_path / "base", tmp_path / "adapter"))
    assert (apart - logits(loaded(tmp_path / "base"), PACK)).abs().max() > 0.01
    assert (apart - merged).abs().max() <= TOLERANCE
    assert (apart - in_peft).abs().max() <= TOLERANCE
    assert load_config(tmp_path / "adapter") == model.config


def test_transformers_opens_our_directory_by_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    spec = LoraSpec(2, 4.0)
    model = adapted(LLAMA, spec)
    write_both(model, spec, tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert (logits(model, PACK) - theirs(opened)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("options", [options for options, _ in CHOICES.values()], ids=CHOICES)
def test_what_is_read_and_written_again_is_equal_to_the_bit(options: dict[str, Any], tmp_path: Path) -> None:
    made_by_peft(LLAMA, tmp_path, **options)
    adapter = tmp_path / "adapter"
    config, spec = load_config(adapter), open_adapter(adapter).spec
    write_adapter(tmp_path / "again", config, spec, tmp_path / "base", read_adapter(adapter, config))
    one, other = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert open_adapter(tmp_path / "again").spec == spec


def test_a_reward_model_of_peft_gives_its_scores(tmp_path: Path) -> None:
    oracle = made_by_peft(replace(LLAMA, pad_token_id=0), tmp_path, task_type="SEQ_CLS", target_modules="all-linear")
    config = load_config(tmp_path / "adapter", "score")
    model = ScalarModel(config)
    for name, tensor in read_model(tmp_path / "adapter", config):
        model.get_parameter(name).copy_(tensor)
    tokens = batch((20,)).tokens.clamp(min=1)  # 0 is padding there
    one = replace(batch((20,)), tokens=tokens)
    assert abs(model(one)[-1] - oracle(tokens[None]).logits[0, 0]) <= TOLERANCE
    assert open_adapter(tmp_path / "adapter").spec.trained == ("score",)


def test_a_reward_model_of_ours_scores_alike_in_peft_and_keeps_its_normalisation(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    config = replace(LLAMA, head="score", pad_token_id=0, score_mean=0.5, score_std=2.0)
    spec = LoraSpec(2, 4.0, trained=("score",))
    model = adapted(config, spec)
    write_both(model, spec, tmp_path)
    assert load_config(tmp_path / "adapter", "score") == config
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = 0
    oracle = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = batch((20,)).tokens.clamp(min=1)
    score = model(replace(batch((20,)), tokens=tokens))[-1]
    assert abs(score - oracle(tokens[None]).logits[0, 0]) <= TOLERANCE


def test_a_vocabulary_that_grew_beside_the_adapter_is_read_with_it(tmp_path: Path) -> None:
    """As continued pre-training with new Chinese pieces leaves it."""
    options = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    oracle = made_by_peft(LLAMA, tmp_path, rows=160, **options)
    assert load_config(tmp_path / "adapter").vocab_size == 160
    assert (logits(loaded(tmp_path / "adapter"), PACK) - theirs(oracle)).abs().max() <= TOLERANCE


def test_an_adapter_may_stand_on_an_adapter(tmp_path: Path) -> None:
    first, second = LoraSpec(2, 4.0, targets=("q_proj", "down_proj")), LoraSpec(3, 3.0)
    model = adapted(LLAMA, first)
    write_both(model, first, tmp_path)
    below = loaded(tmp_path / "adapter")
    add_lora(below, second)
    fill_adapters(below)
    write_adapter(tmp_path / "second", LLAMA, second, tmp_path / "adapter", trained(below, second))
    assert (logits(below, PACK) - logits(loaded(tmp_path / "second"), PACK)).abs().max() <= TOLERANCE


def fill_adapters(model: CausalLM) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_a_product_is_added_in_fp32_and_not_rounded_to_the_base(tmp_path: Path) -> None:
    spec = LoraSpec(2, 4.0)
    model = adapted(LLAMA, spec)
    write_both(model, spec, tmp_path)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, tmp_path / "base" / "model.safetensors")
    given = dict(read_model(tmp_path / "adapter", LLAMA))
    weight = model.model.layers[1].mlp.down_proj
    expected = weight.weight.bfloat16().double() + 2 * weight.lora_b.double() @ weight.lora_a.double()
    torch.testing.assert_close(given["model.layers.1.mlp.down_proj.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    assert given["model.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("named", ["absolute", "beside the adapter", "in the working directory"])
def test_a_base_is_found(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LoraSpec(2, 4.0)
    write_both(adapted(LLAMA, spec), spec, tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    facts = json.loads(path.read_text())
    assert facts["base_model_name_or_path"] == str(tmp_path / "base")
    if named == "beside the adapter":
        path.write_text(json.dumps({**facts, "base_model_name_or_path": "../base"}))
    elif named == "in the working directory":
        monkeypatch.chdir(tmp_path)
        path.write_text(json.dumps({**facts, "base_model_name_or_path": "base"}))
    assert open_adapter(tmp_path / "adapter").base.samefile(tmp_path / "base")
