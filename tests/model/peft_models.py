"""Adapters that PEFT makes of transformers' models, with random values in everything that is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import ModelConfig
from model.hf_config import config_to_hf
from tests.model.tiny import transformers_model


def made_by_peft(config: ModelConfig, folder: Path, rows: int | None = None, **options: Any) -> Any:
    """PEFT's model of a tiny base, written to `folder/base`, and of an adapter, written to `folder/adapter`.

    Args:
        rows: resize the vocabulary before training.
        options: of LoraConfig; task_type SEQ_CLS puts a score head on the base.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(config_to_hf(config, "float32")))
    model = transformers_model(base)
    model.save_pretrained(base)
    if options.get("task_type") == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    model.name_or_path = str(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 10, **options}))
    shake(adapted)
    adapted.save_pretrained(str(folder / "adapter"))
    return adapted.eval()


def shake(model: nn.Module, seed: int = 5) -> None:
    """Add noise to every parameter that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def opened_by_peft(base: Path, adapter: Path) -> Any:
    """What PEFT makes of a base and an adapter's directory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(model, adapter).eval()
