"""What users get wrong with adapters: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes.py`, where `adapter` stands on `base`, and `wide` is another model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tools.mistakes import Mistake

_Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"


def merge(spoil: Callable[[Path], None] | None = None, source: str = "adapter") -> Mistake:
    return Mistake("convert", ("merge", source, "--out", "new"), spoil)


def told(by_peft: bool = False, **facts: Any) -> Callable[[Path], None]:
    """adapter_config.json says something else; and, by_peft, our own file beside it is not there."""

    def spoil(folder: Path) -> None:
        if by_peft:
            (folder / "adapter" / "adapted_config.json").unlink()
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))

    return spoil


def kept(**changed: Tensor | None) -> Callable[[Path], None]:
    """adapter_model.safetensors holds other tensors, or, None, one less."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter" / "adapter_model.safetensors"
        weights = {**load_file(path), **changed}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)

    return spoil


def put_a_whole_model_there(folder: Path) -> None:
    shutil.copy(folder / "base" / "model.safetensors", folder / "adapter")


def train_the_base_on(folder: Path) -> None:
    path = folder / "base" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)


def choose_one_layer(folder: Path) -> None:
    """Of all but q_proj."""
    kept(**{f"{_Q_PROJ}.lora_{matrix}.weight": None for matrix in "AB"})(folder)
    told(target_modules=r".*layers\.0\..*|.*layers\.1\..*_proj", exclude_modules=["layers.1.self_attn.q_proj"])(folder)


MISTAKES_ADAPTERS: dict[str, Mistake] = {
    "a whole model to be merged": merge(source="base"),
    "an adapter of another kind": merge(told(peft_type="IA3")),
    "an adapter that is more than a low-rank product": merge(told(use_dora=True)),
    "an adapter of several ranks": merge(told(rank_pattern={"q_proj": 4})),
    "an adapter that changed its base when it began": merge(told(init_lora_weights="pissa")),
    "an adapter whose base is not there": merge(told(base_model_name_or_path="IDEA-CCNL/Ziya2-13B-Base")),
    "an adapter that names no base": merge(told(base_model_name_or_path=None)),
    "an adapter that stands on itself": merge(told(base_model_name_or_path=".")),
    "an adapter of another model than its base": merge(told(True, base_model_name_or_path="wide")),
    "an adapter whose base has been trained on": merge(train_the_base_on),
    "an adapter of another rank than it says": merge(told(r=4)),
    "an adapter without some of its weights": merge(kept(**{f"{_Q_PROJ}.lora_A.weight": None})),
    "an adapter of the head": merge(kept(**{"base_model.model.lm_head.lora_A.weight": torch.ones(2, 24)})),
    "an adapter with modules trained whole that are not supported": merge(told(modules_to_save=["norm"])),
    "an adapter without a module that was trained whole": merge(told(modules_to_save=["embed_tokens"])),
    "an adapter of projections that its target_modules does not choose": merge(told(target_modules=["q_proj"])),
    "target_modules that is no pattern": merge(told(target_modules="(q_proj")),
    "an adapter of other projections in other layers": merge(choose_one_layer),
    "an adapter without its weights": Mistake(
        "convert", ("merge", "adapter", "--out", "new"), {"adapter/adapter_model.safetensors": None}
    ),
    "an adapter and a whole model in one directory": merge(put_a_whole_model_there),
}
