"""What users get wrong when they train adapters: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes_rm.py`, where `adapted` is a finished run of adapters on `chat-base`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.tools.mistakes import Mistake, pretrain_new
from tests.tools.mistakes_ppo import ppo
from tests.tools.mistakes_sft import sft, sft_new


def adapted(*words: object, **how: Any) -> Mistake:
    """The finished run goes on, with these words behind it."""
    return sft("--out", "adapted", *words, **how)


def train_its_base_on(folder: Path) -> None:
    path = folder / "chat-base" / "model.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)


MISTAKES_LORA = {
    "adapters of fresh weights": pretrain_new("--model", "tiny", "--lora.rank", 2),
    "adapters in the directory of their base": sft("--out", "chat-base", "--lora.rank", 2),
    "--lora.targets that are no projections": sft_new("--lora.rank", 2, "--lora.targets", "q_proj", "query"),
    "--lora.targets without a name": sft_new("--lora.rank", 2, "--lora.targets", "[]"),
    "--lora.alpha of 0": sft_new("--lora.rank", 2, "--lora.alpha", 0),
    "--lora.alpha without --lora.rank": sft_new("--lora.alpha", 32),
    "the checkpoint in --out has other adapters": adapted("--lora.rank", 2, "--lora.alpha", 8),
    "the checkpoint in --out is of adapters, and all weights are to be trained": adapted(),
    "adapters beside 8-bit products": sft_new("--lora.rank", 2, "--train.fp8"),
    "8-bit products in PPO": ppo("--train.fp8"),
    "--lora.dropout in PPO": ppo("--lora.rank", 2, "--lora.dropout", 0.1),
    "the base of a run of adapters has changed": adapted("--lora.rank", 2, spoil=train_its_base_on),
}
