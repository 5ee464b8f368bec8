"""adapter_config.json of PEFT, read into a LoraSpec and written from one.

What it can say and `LoraSpec` cannot hold is an error that names it: fields that change what an adapter computes, and
modules that get an adapter in some layers only.
"""

from __future__ import annotations

import re
from typing import Any

from model.config import ModelConfig
from model.errors import InputError
from model.lora import TARGETS, TRAINED, LoraSpec

MERGE = "Merge the adapter with PEFT (merge_and_unload), and give the whole model."

_TASKS = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}
_WANTED = {"peft_type": ("LORA",), "task_type": (None, *_TASKS.values()), "bias": (None, "none")}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # ways to begin that put other weights into the base
# Fields that are read here, or say nothing of what the adapter computes once it is trained. Every other one has to be
# null, false or empty.
_KNOWN = {
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("modules_to_save", "ensure_weight_tying", "auto_mapping", "peft_version", "revision", "inference_mode"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config", "layers_pattern"),
    *("megatron_core", "qalora_group_size"),
}


def require_supported(facts: dict[str, Any], source: str) -> None:
    """Raises InputError: another kind of adapter, or one that is more than `LoraSpec` holds.

    Args:
        facts: the content of adapter_config.json.
        source: what messages call it.
    """
    for name, value in {"peft_type": None, **facts}.items():
        if name in _WANTED:
            is_held = value in _WANTED[name]
        elif name == "init_lora_weights":
            is_held = not str(value).lower().startswith(_CHANGES_BASE)
        else:
            is_held = name in _KNOWN or not value
        if not is_held:
            raise InputError(f"{source}: {name} is {value!r}, which is not supported. {MERGE}")


def spec_from_peft(facts: dict[str, Any], adapted: set[str], whole: list[str], source: str) -> LoraSpec:
    """The LoraSpec of an adapter.

    Args:
        facts, source: as in `require_supported`.
        adapted: full names of the projections that there are adapters' weights of.
        whole: modules that there are whole weights of, of TRAINED.
    Raises:
        InputError: a value of another kind, or the weights are not those that it promises.
    """
    for name in facts.get("modules_to_save") or []:
        module = name.rpartition(".")[2]
        if module in whole or module == "classifier":  # PEFT lists it with every score
            continue
        if module not in TRAINED:
            raise InputError(f"{source}: modules_to_save names {name}; {', '.join(TRAINED)} are supported. {MERGE}")
        raise InputError(
            f"{source}: modules_to_save names {name}, but there are no weights of it. Save the adapter again."
        )
    if facts.get("task_type") == "SEQ_CLS" and "score" not in whole:
        raise InputError(f"{source}: task_type is SEQ_CLS, but there are no weights of score. Save the adapter again.")
    return LoraSpec(
        rank=_number(facts, "r", source, int),
        alpha=float(_number(facts, "lora_alpha", source, (int, float))),
        dropout=float(facts.get("lora_dropout") or 0.0),
        rslora=bool(facts.get("use_rslora")),
        targets=_targets(facts, adapted, source),
        trained=tuple(module for module in TRAINED if module in whole),
    )


def spec_to_peft(spec: LoraSpec, config: ModelConfig, whole: list[str], base: str) -> dict[str, Any]:
    """The content of an adapter_config.json.

    Args:
        config: of the model that base and adapter make.
        whole: modules whose whole weights are written.
        base: the directory of the base.
    """
    is_tied = config.tie_word_embeddings and "embed_tokens" in whole
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[config.head],
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,  # some readers want it whole
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": list(spec.targets),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **({"ensure_weight_tying": True} if is_tied else {}),  # a field that older versions do not know
    }


def _targets(facts: dict[str, Any], adapted: set[str], source: str) -> tuple[str, ...]:
    """The projections that have an adapter, the same in every layer."""
    targets = tuple(target for target in TARGETS if any(module.endswith(f".{target}") for module in adapted))
    layers = {int(module.split(".")[2]) for module in adapted}
    blocks = [f"{'self_attn' if target[0] in 'qkvo' else 'mlp'}.{target}" for target in TARGETS]
    modules = [f"model.layers.{layer}.{block}" for layer in layers for block in blocks]
    expected = {module for module in modules if _is_target(module, facts, source)}
    if not adapted:
        raise InputError(f"{source}: there are no weights of any projection beside it. Save the adapter again.")
    if expected != adapted:
        odd = min(expected ^ adapted)
        found = f"does not choose {odd}, but there are" if odd in adapted else f"chooses {odd}, but there are no"
        raise InputError(f"{source}: target_modules {found} weights of it. Save the adapter again.")
    if layers != set(range(len(layers))) or len(adapted) != len(layers) * len(targets):
        raise InputError(
            f"{source}: target_modules chooses other projections in other layers, which is not supported. {MERGE}"
        )
    return targets


def _is_target(module: str, facts: dict[str, Any], source: str) -> bool:
    """Whether PEFT gives a projection an adapter, by its full name; q and v where nothing is said."""
    targets, excluded = facts.get("target_modules") or ["q_proj", "v_proj"], facts.get("exclude_modules") or []
    is_all = isinstance(targets, str) and targets.lower() == "all-linear"
    return (is_all or _is_named(module, targets, source)) and not _is_named(module, excluded, source)


def _is_named(module: str, names: str | list[str], source: str) -> bool:
    """By a pattern that matches the full name, or by one of several ends of it."""
    if not isinstance(names, str):
        return any(f".{module}".endswith(f".{name}") for name in names)
    try:
        return re.fullmatch(names, module) is not None
    except re.error as error:
        raise InputError(f"{source}: {names!r} is no regular expression ({error}). Correct it.") from None


def _number(facts: dict[str, Any], name: str, source: str, kind: Any) -> Any:
    value = facts.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise InputError(f"{source}: {name} is {value!r}; a number above 0 belongs there. Correct the file.")
    return value
