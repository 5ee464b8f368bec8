"""A chat model of milliseconds, and how to talk to it: a tool's stdin, and what transformers would have answered."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from model.chat import ChatTemplate
from model.config import parameter_shapes
from model.hf import load_config, write_model
from model.tokenizer import Tokenizer
from tests.small_base import write_small_base
from tests.tools.in_child import Ended, run_tool


def write_small_chat_model(directory: Path, context: int = 256) -> Path:
    """Random weights with the template chimed. They are large, so that greedy answers wander and near-ties are rare."""
    write_small_base(directory, context)
    config, generator = load_config(directory), torch.Generator().manual_seed(1)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator)
        for name, shape in parameter_shapes(config).items()
    }
    write_model(directory, config, iter(weights.items()), torch.float32)
    tokenizer = Tokenizer.load(directory)
    ChatTemplate.named("chimed", tokenizer).store(tokenizer).save(directory)
    return directory


def end_answers_at(directory: Path, *ids: int) -> None:
    """Let generation_config.json name these ends too, as instruction-tuned models do."""
    path = directory / "generation_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "eos_token_id": [facts["eos_token_id"], *ids]}))


def read_from(name: str) -> None:
    """Have this process read its stdin from a file."""
    sys.stdin = open(name, encoding="ascii")  # noqa: SIM115  and let the tool see to the encoding


def chat(folder: Path, lines: Sequence[str], *words: object, before: Callable[[], None] | None = None) -> Ended:
    """Talk to the model in `folder/model` through a pipe."""
    (folder / "lines").write_text("".join(f"{line}\n" for line in lines))
    (ended,) = run_tool(
        "chat", "--model", "model", *words, cwd=folder, before=before or functools.partial(read_from, "lines")
    )
    return ended


def transformers_answer(directory: Path, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """The greedy answer, by apply_chat_template and generate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0)
    ids = out[0, prompt["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    if ids[-1] in (ends if isinstance(ends, list) else [ends]):
        ids.pop()
    return tokenizer.decode(ids, skip_special_tokens=True)
