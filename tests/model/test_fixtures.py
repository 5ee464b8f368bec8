"""Published models: their config.json and tensors are exactly what a meta-device model asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model.config import parameter_shapes
from model.heads import CausalLM
from model.hf import hf_parameters
from model.hf_config import config_from_hf, config_to_hf

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
PUBLISHED = {"ziya2-13b", "llama-2-7b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b"}

every_fixture = pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)


def tensors(fixture: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the published files."""
    named = dict(fixture["tensors"])
    for layer in range(fixture["config"]["num_hidden_layers"]):
        named |= {f"model.layers.{layer}.{name}": shape for name, shape in fixture["tensors_of_each_layer"].items()}
    return {name: tuple(shape) for name, shape in named.items()}


def test_all_published_models_are_here() -> None:
    assert {path.stem for path in FIXTURES} == PUBLISHED


@every_fixture
def test_a_meta_model_takes_every_published_tensor_and_no_other(path: Path) -> None:
    fixture = json.loads(path.read_text())
    config = config_from_hf(fixture["config"])
    published = tensors(fixture)
    wanted = {name: shape for parts in hf_parameters(config).values() for name, shape in parts}
    assert wanted == published
    with torch.device("meta"):
        model = CausalLM(config.with_context(2048))
        state = {
            name: torch.cat([torch.empty(published[part]) for part, _ in parts])
            for name, parts in hf_parameters(config).items()
        }
    missing, unexpected = model.load_state_dict(state, strict=True, assign=True)
    assert not missing and not unexpected
    assert sum(parameter.numel() for parameter in model.parameters()) == fixture["parameters"]
    assert config.num_parameters == fixture["parameters"]
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)


@every_fixture
def test_the_fixture_is_what_transformers_builds_from_its_config(path: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fixture = json.loads(path.read_text())
    (tmp_path / "config.json").write_text(json.dumps(fixture["config"]))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert {name: tuple(p.shape) for name, p in theirs.named_parameters()} == tensors(fixture)


@every_fixture
def test_facts_survive_a_round_trip(path: Path) -> None:
    """Every field that config.json says and we keep is written as it was read."""
    facts = json.loads(path.read_text())["config"]
    written = config_to_hf(config_from_hf(facts), facts["torch_dtype"])
    unknown = {"pretraining_tp", "use_mrope"}
    if not facts.get("use_sliding_window", True):
        unknown |= {"sliding_window", "max_window_layers"}  # without effect there
    for name in facts.keys() - unknown - {"rope_scaling"}:
        assert written[name] == facts[name], name
    scaling = facts.get("rope_scaling")
    if scaling is not None:
        assert scaling.items() <= written["rope_scaling"].items()
    assert config_from_hf(written) == config_from_hf(facts)
