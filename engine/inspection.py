"""What a model directory holds, on one screen: for people, before they train, chat or convert.

What cannot be read does not end it; it stands in the list of what is missing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.conversion import end_ids
from engine.files import human_size
from engine.publish import MODEL_COMPLETE, require_model
from model.chat import ChatTemplate
from model.config import ModelConfig
from model.directories import lineage, read_json
from model.errors import InputError
from model.hf import hf_parameters, load_config, read_model
from model.hf_config import config_to_hf
from model.kv_cache import PAGE, page_bytes
from model.peft import Adapter, open_adapter
from model.tokenizer import Tokenizer, has_tokenizer
from model.weight_files import TensorStore

T = TypeVar("T")

_PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "feed-forward",
    "lm_head": "head",
    "score": "head",
}
_SHARDS_SHOWN = 8


def describe_model(directory: Path | str) -> str:
    """The facts, a line each.

    Raises:
        InputError: no such directory, or there is no config.json in it, or an adapter without its base.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: there is no such directory. Check the path.")
    *adapters, whole = lineage(directory)
    facts, missing = read_json(whole / "config.json"), _Missing()
    missing.attempt(lambda: require_model(directory))
    config = missing.attempt(lambda: load_config(directory))
    if adapters and config is not None:
        facts = config_to_hf(config, "bfloat16")
    scores = is_scorer(facts)
    store = missing.attempt(lambda: TensorStore(whole))
    tokenizer = template = None
    if has_tokenizer(directory):
        tokenizer = missing.attempt(lambda: Tokenizer.load(directory))
    else:
        missing.add(f"{directory} holds no tokenizer. Training takes one by --tokenizer; chatting needs it there.")
    if tokenizer is not None:
        template = missing.attempt(lambda: ChatTemplate.of(tokenizer))
        if template is None and not scores:
            missing.add("There is no chat template: train one in with tools/sft.py, or chat with --chat.template NAME.")
    if config is not None and store is not None:
        missing.attempt(lambda: read_model(directory, config))

    lines = [("model", str(directory)), ("made by", _maker(directory))]
    lines += [("architecture", ", ".join(facts.get("architectures") or ["not named"]) + _shape(config))]
    for each in adapters:
        lines += [("adapter", _adapter(adapter))] if (adapter := missing.attempt(partial(open_adapter, each))) else []
    if store is not None:
        shapes = store.shapes
        if adapters and config is not None:
            shapes = {name: shape for parts in hf_parameters(config).values() for name, shape in parts}
        lines += [("parameters", _parameters(shapes)), *_weights(store)]
    if config is not None:
        lines += [("context", _context(config))]
    if tokenizer is not None:
        lines += _vocabulary(directory, config, tokenizer, missing)
    if template is not None:
        lines += [("chat template", f"{'its own' if template.name == 'own' else template.name}")]
    if config is not None:
        lines += _memory(config)
    lines += [("missing", text) for text in missing.texts or ["nothing"]]
    return "\n".join(
        f"{'' if name == before else name:<14}{text}" for before, (name, text) in _with_names_before(lines)
    )


class _Missing:
    """What was found wanting."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        if text not in self.texts:
            self.texts.append(text)

    def attempt(self, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except InputError as error:
            self.add(str(error))
            return None


def _with_names_before(lines: list[tuple[str, str]]) -> list[tuple[str, tuple[str, str]]]:
    return list(zip(["", *(name for name, _ in lines)], lines, strict=False))


def is_scorer(facts: dict[str, Any]) -> bool:
    """Whether a config.json is that of a reward or value model: one number a token, and no words."""
    return any("SequenceClassification" in name for name in facts.get("architectures") or [])


def _maker(directory: Path) -> str:
    try:
        marker = json.loads((directory / MODEL_COMPLETE).read_text(encoding="utf-8"))
        return marker["stage"] + (f", after {marker['step']:,} steps" if marker["step"] else "")
    except (OSError, ValueError, LookupError, TypeError):
        return f"another program (it has no {MODEL_COMPLETE})"


def _shape(config: ModelConfig | None) -> str:
    if config is None:
        return ""
    return (
        f": {config.num_layers} layers of width {config.hidden_size}, {config.num_heads} heads of {config.head_dim} "
        f"({config.num_kv_heads} for keys and values), feed-forward {config.intermediate_size}"
        + (", tied head" if config.tie_word_embeddings else "")
    )


def _adapter(adapter: Adapter) -> str:
    spec, count = adapter.spec, sum(torch.Size(shape).numel() for shape in adapter.shapes.values())
    whole = f"; {', '.join(spec.trained)} trained whole" if spec.trained else ""
    scale = f"alpha {spec.alpha:g}{', rsLoRA' if spec.rslora else ''}"
    return f"{count:,} parameters: rank {spec.rank}, {scale}, of {', '.join(spec.targets)}{whole}; on {adapter.base}"


def _parameters(shapes: dict[str, tuple[int, ...]]) -> str:
    parts: Counter[str] = Counter()
    for name, shape in shapes.items():
        part = next((part for module, part in _PARTS.items() if f".{module}." in f".{name}"), "norms")
        parts[part] += torch.Size(shape).numel()
    return f"{parts.total():,}: " + ", ".join(f"{part} {count:,}" for part, count in parts.items())


def _weights(store: TensorStore) -> list[tuple[str, str]]:
    kinds = ", ".join(dict.fromkeys(store.dtypes.values()))
    sizes = [(path.name, path.stat().st_size) for path in store.files]
    total = human_size(sum(size for _, size in sizes))
    rows = [("weights", f"{kinds}, {total} in {len(sizes)} {'file' if len(sizes) == 1 else 'files'}")]
    rows += [("weights", f"{name}  {human_size(size)}") for name, size in sizes[:_SHARDS_SHOWN]]
    return rows + [("weights", f"and {len(sizes) - _SHARDS_SHOWN} more")] * (len(sizes) > _SHARDS_SHOWN)


def _context(config: ModelConfig) -> str:
    text, scaling = f"{config.max_position_embeddings:,} tokens, rope theta {config.rope_theta:g}", config.rope_scaling
    if scaling is not None:
        text += f", {scaling.kind} scaling by {scaling.factor:g}"
        if scaling.original_max_position_embeddings is not None:
            text += f" from {scaling.original_max_position_embeddings:,}"
    return text if config.sliding_window is None else f"{text}, a sliding window of {config.sliding_window:,}"


def _vocabulary(
    directory: Path, config: ModelConfig | None, tokenizer: Tokenizer, missing: _Missing
) -> list[tuple[str, str]]:
    kind = "byte-level BPE" if "ByteLevel" in str(tokenizer.decoder) else "SentencePiece BPE, bytes as a fallback"
    rows = "" if config is None else f" of {config.vocab_size:,} rows"
    named = {name.removesuffix("_token"): text for name, text in tokenizer.special_names.items()}
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id, "unk": tokenizer.unk_id}
    special = ", ".join(f"{name} {named[name]} {index}" for name, index in ids.items() if index is not None)
    lines = [("vocabulary", f"{tokenizer.vocab_size:,} ids{rows}; {kind}"), ("special ids", special)]
    if config is None:
        return lines
    if tokenizer.vocab_size > config.vocab_size:
        missing.add(
            f"{tokenizer.vocab_size - config.vocab_size} ids of the tokenizer have no row. Add them with "
            "tools/convert.py import --pad_vocab 64."
        )
    ends = missing.attempt(lambda: end_ids(config, directory)) or ()
    if tokenizer.eos_id not in ends:
        missing.add(
            f"config.json ends answers at {list(ends)}, the tokenizer at {tokenizer.eos_id}. Set eos_token_id there."
        )
    return [*lines, ("special ids", f"answers end at {', '.join(map(str, ends)) or 'none'}")]


def _memory(config: ModelConfig) -> list[tuple[str, str]]:
    count, token = config.num_parameters, page_bytes(config, torch.bfloat16) // PAGE
    context = human_size(token * config.max_position_embeddings)
    return [
        ("memory", f"weights {human_size(2 * count)} in bfloat16, {human_size(4 * count)} in float32"),
        ("memory", f"keys and values in bfloat16 {human_size(token)} a token, {context} for a full context"),
        ("memory", f"training {human_size(16 * count)} over all GPUs: fp32 weights, gradients and two moments"),
    ]
