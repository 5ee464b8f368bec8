"""Configurations: presets, counts, and every config.json that is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from model.config import PRESETS, RopeScaling
from model.errors import InputError
from model.hf_config import config_from_hf, config_to_hf
from tests.model.tiny import CONFIGS, LLAMA

FACTS = config_to_hf(LLAMA, "bfloat16")


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 4.07), ("160m", 159.7), ("1b", 1130.5), ("7b", 6799.2), ("ziya2-13b", 13091.9)]
)
def test_presets_have_the_size_of_their_name(name: str, millions: float) -> None:
    assert abs(PRESETS[name].num_parameters / 1e6 - millions) < 0.1


def test_there_are_no_other_presets() -> None:
    assert set(PRESETS) == {"tiny", "160m", "1b", "7b", "ziya2-13b"}


def test_flops_of_llama_2_7b_are_the_published_figure() -> None:
    """46.1 GFLOP a token at context 4096, by PaLM's convention."""
    llama = replace(PRESETS["7b"], vocab_size=32000)
    assert abs(llama.flops_per_token(4096) / 1e9 - 46.1) < 0.05
    attention = llama.flops_per_token(4096) - llama.flops_per_token(0)
    assert attention == 12 * 32 * 32 * 128 * 4096
    assert llama.flops_per_token(4096, causal=True) == llama.flops_per_token(0) + attention / 2


def test_a_tied_head_counts_once_as_a_parameter_and_once_as_work() -> None:
    tied, untied = replace(LLAMA, tie_word_embeddings=True), LLAMA
    assert untied.num_parameters - tied.num_parameters == 131 * 48
    assert untied.num_matmul_parameters == tied.num_matmul_parameters


def test_a_sliding_window_bounds_the_work_of_its_layers() -> None:
    config = CONFIGS["qwen2 with a window"]
    assert [config.window(layer) for layer in range(2)] == [None, 5]
    assert config.flops_per_token(40) - config.flops_per_token(0) == 12 * 4 * 12 * (40 + 5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_configuration_survives_its_config_json(config) -> None:
    assert config_from_hf(config_to_hf(config, "float32")) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}}, "3 labels"),
        ({"score_mean": 0.5}, "belong together"),
        ({"score_mean": 0.5, "score_std": 0.0}, "normalise nothing"),
        ({"score_mean": 0.5, "score_std": float("nan")}, "normalise nothing"),
        ({"score_mean": "high", "score_std": 1.0}, "score_mean is 'high'"),
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "mixtral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3", "architectures": None, "attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "high_freq_factor"),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 11}, "head_dim"),
        (
            {
                "model_type": "qwen2",
                "architectures": None,
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "layer_types",
        ),
    ],
    ids=str,
)
def test_what_we_cannot_compute_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        config_from_hf({**FACTS, **change}, "somewhere/config.json")
    assert str(error.value).count("somewhere/config.json") <= 1


def test_silence_means_what_transformers_means_by_it() -> None:
    old = {key: value for key, value in FACTS.items() if key not in ("num_key_value_heads", "head_dim", "rope_theta")}
    config = config_from_hf(old)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 12, 10000.0)
    mistral = {**FACTS, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert config_from_hf(mistral).sliding_window == 4096
    assert config_from_hf({**mistral, "sliding_window": None}).sliding_window is None
    assert config_from_hf({**FACTS, "architectures": ["LLaMAForCausalLM"]}) == config_from_hf(FACTS)


def test_a_window_that_is_switched_off_is_none() -> None:
    """Qwen's files state a window that they do not use."""
    window = {"sliding_window": 5, "max_window_layers": 1}
    qwen = {**FACTS, **window, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    assert config_from_hf({**qwen, "use_sliding_window": False}).sliding_window is None
    assert config_from_hf(qwen).sliding_window is None
    assert config_from_hf({**qwen, "use_sliding_window": True}).window(1) == 5


def test_several_end_tokens_are_kept() -> None:
    config = config_from_hf({**FACTS, "eos_token_id": [5, 6]})
    assert config.eos_token_id == (5, 6)
    assert config_to_hf(config, "bfloat16")["eos_token_id"] == [5, 6]
    assert hash(config)


def test_a_run_may_use_the_context_that_the_scaling_allows_and_no_more() -> None:
    assert LLAMA.with_context(64).rope_length == 64
    with pytest.raises(InputError, match="65 tokens is longer than the 64"):
        LLAMA.with_context(65)
    stretched = replace(LLAMA, rope_scaling=RopeScaling("yarn", 4.0, 32))
    assert stretched.with_context(128).rope_length == 128
    with pytest.raises(InputError, match="129 tokens"):
        stretched.with_context(129)
