"""config.json of a Hugging Face model directory, read into a ModelConfig and written from one.

Both spellings of transformers are read: `rope_theta` and `rope_scaling` (before version 5) or `rope_parameters`,
`torch_dtype` or `dtype`. The older one is written, for every version and serving stack reads it. A field that
would change the mathematics in a way the decoder does not compute is an error that names it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from model.config import Head, ModelConfig, RopeScaling
from model.errors import InputError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LM, _SCORE = "ForCausalLM", "ForSequenceClassification"

# What transformers assumes where config.json is silent, as far as it differs between architectures.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}

# Fields that change the mathematics, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (1, 1.0),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_scaling": (1, 1.0),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "quantization_config": (),
    "use_mrope": (False,),
    "is_encoder_decoder": (False,),
}

_SCALINGS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
}


def config_from_hf(facts: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The ModelConfig that a config.json describes.

    Args:
        facts: its content.
        source: what messages call it.
    Raises:
        InputError: an architecture or a field that is not supported, or a required field that is missing.
    """
    model_type = _model_type(facts, source)
    head = _head(facts, source)
    for name, neutral in _NEUTRAL.items():
        value = facts.get(name)
        if value is not None and value not in neutral:
            wanted = f"only {neutral[0]!r} is supported" if neutral else "it is not supported"
            raise InputError(f"{source}: {name} is {value!r}; {wanted}. Choose another base model.")
    if model_type != "qwen2" and facts.get("attention_bias"):
        # There it puts a bias on the output projection too.
        raise InputError(f"{source}: attention_bias is true; {model_type} is supported without. Choose another base.")

    # A null says the same as silence, but for the window, where it says that there is none.
    window = facts.get("sliding_window", _DEFAULTS[model_type].get("sliding_window"))
    facts = {**_DEFAULTS[model_type], **{name: value for name, value in facts.items() if value is not None}}
    facts["sliding_window"] = window

    def number(name: str, default: float | None = None) -> Any:
        value = facts.get(name, default)
        kinds = (int, float) if isinstance(default, float) else int
        if not isinstance(value, kinds) or value <= 0:
            raise InputError(f"{source}: {name} is {value!r}; a positive number belongs there. Correct the file.")
        return value

    hidden_size, layers, heads = number("hidden_size"), number("num_hidden_layers"), number("num_attention_heads")
    theta, scaling = _rope(facts, source)
    window, full_layers = _window(facts, model_type, source)
    eos = facts.get("eos_token_id")
    return ModelConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=number("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden_size // heads),
        max_position_embeddings=number("max_position_embeddings"),
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=facts.get("tie_word_embeddings", False),
        attention_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        sliding_window=window,
        max_window_layers=full_layers,
        initializer_range=number("initializer_range", 0.02),
        model_type=model_type,
        bos_token_id=facts.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=facts.get("pad_token_id"),
        head=head,
        score_mean=_moment(facts, "score_mean", source),
        score_std=_moment(facts, "score_std", source),
    )


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of a config.json for weights of a dtype ("bfloat16", "float32")."""
    architecture = ARCHITECTURES[config.model_type]
    facts: dict[str, Any] = {
        "architectures": [architecture if config.head == "lm" else architecture.replace(_LM, _SCORE)],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
    }
    if config.model_type == "llama":
        facts |= {"attention_bias": False, "mlp_bias": False}
    if config.model_type == "mistral":
        facts["sliding_window"] = config.sliding_window
    if config.model_type in ("qwen2", "qwen3"):
        facts |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": config.max_window_layers,
        }
    if config.model_type == "qwen3":
        facts["attention_bias"] = False
    if config.head == "score":
        # transformers takes the number of labels from their names.
        facts |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    if config.score_std is not None:
        facts |= {"score_mean": config.score_mean, "score_std": config.score_std}
    return facts


def _model_type(facts: dict[str, Any], source: str) -> str:
    model_type = facts.get("model_type")
    supported = ", ".join(ARCHITECTURES.values())
    if model_type not in ARCHITECTURES:
        raise InputError(f"{source}: model_type is {model_type!r}. Supported are {supported}: choose such a base.")
    for architecture in facts.get("architectures") or []:
        # The first conversions of LLaMA spelled the class LLaMAForCausalLM.
        if architecture.replace(_SCORE, _LM).lower() != ARCHITECTURES[model_type].lower():
            raise InputError(
                f"{source}: architectures names {architecture}. Supported are {supported}, and {_SCORE} of each."
            )
    return model_type


def _head(facts: dict[str, Any], source: str) -> Head:
    if not any(architecture.endswith(_SCORE) for architecture in facts.get("architectures") or []):
        return "lm"
    # Silence means two labels.
    labels = facts.get("num_labels") or len(facts.get("id2label") or (0, 1))
    if labels != 1:
        raise InputError(
            f"{source}: a classifier of {labels} labels; a reward model has one. Choose a model with num_labels 1."
        )
    return "score"


def _moment(facts: dict[str, Any], name: str, source: str) -> float | None:
    """One of the two numbers that scores are normalised by."""
    value = facts.get(name)
    if value is not None and not isinstance(value, (int, float)):
        raise InputError(f"{source}: {name} is {value!r}; a number belongs there. Correct the file.")
    return value


def _rope(facts: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from either spelling."""
    given = facts.get("rope_parameters") or facts.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in given.values()):
        raise InputError(
            f"{source}: rope_parameters differ between layers, which is not supported. Choose another base."
        )
    if given.get("partial_rotary_factor") not in (None, 1, 1.0) or given.get("mrope_section") is not None:
        raise InputError(
            f"{source}: partial_rotary_factor or mrope_section rotates heads in parts; that is not supported. "
            "Choose another base."
        )
    theta = float(given.get("rope_theta") or facts.get("rope_theta") or 10000.0)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise InputError(f"{source}: rope_type is {kind!r}; supported are default, {known}. Choose another base.")
    for name in sorted(_SCALINGS[kind]):
        if not isinstance(given.get(name), (int, float)):
            raise InputError(f"{source}: {kind} rotary scaling needs the number {name}, not {given.get(name)!r}.")
    names = {field.name for field in fields(RopeScaling)} - {"kind"}
    scaling = {name: value for name, value in given.items() if name in names and value is not None}
    if kind in ("yarn", "llama3"):
        original = facts.get("original_max_position_embeddings") or facts["max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", original)
    return theta, RopeScaling(kind=kind, **scaling)


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """As the first version of transformers that knew the kind wants it: some refuse a field more."""
    if scaling is None:
        return None
    if scaling.kind in ("linear", "dynamic"):
        return {"type": scaling.kind, "factor": scaling.factor}
    given = {field.name: getattr(scaling, field.name) for field in fields(scaling) if field.name != "kind"}
    if scaling.truncate:
        del given["truncate"]
    return {"rope_type": scaling.kind} | {name: value for name, value in given.items() if value is not None}


def _window(facts: dict[str, Any], model_type: str, source: str) -> tuple[int | None, int]:
    """Sliding window, and the number of leading layers that see everything."""
    window, layers = facts["sliding_window"], facts["num_hidden_layers"]
    if model_type == "llama":
        return None, 0
    full_layers = 0
    if model_type != "mistral":
        window = window if facts.get("use_sliding_window") else None
        full_layers = min(facts["max_window_layers"], layers)
    types = facts.get("layer_types")
    if types is not None:
        sliding = [kind == "sliding_attention" for kind in types]
        full_layers = layers - sum(sliding)
        if (
            len(types) != layers
            or sliding != sorted(sliding)
            or not set(types) <= {"sliding_attention", "full_attention"}
        ):
            raise InputError(f"{source}: layer_types must be full_attention layers, then sliding_attention layers.")
    if window is None or full_layers == layers:
        return None, 0
    return window, full_layers
