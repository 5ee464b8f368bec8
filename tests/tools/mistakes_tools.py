"""What users get wrong in converting models and chatting with them: one mistake a row of docs/errors.md.

Each is played in the folder of `mistakes.py`, where `tuned` is what fine-tuning has left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tools.mistakes import Mistake

QUESTIONS = '{"question": "头晕怎么办？"}\n'


def convert(*words: object, **how: Any) -> Mistake:
    return Mistake("convert", words, **how)


def chat(*words: object, **how: Any) -> Mistake:
    return Mistake("chat", ("--model", "tuned", *words), **how)


def answer(*words: object, spoil: dict[str, str] | None = None) -> Mistake:
    """Batch mode on a file of one question."""
    files = {"questions.jsonl": QUESTIONS, **(spoil or {})}
    return chat("--input", "questions.jsonl", "--output", "answers.jsonl", *words, spoil=files)


def put_into_base(folder: Path, value: float | None = None, dtype: torch.dtype = torch.float32) -> None:
    path = folder / "base" / "model.safetensors"
    weights = load_file(path)
    norm = weights["model.norm.weight"] if value is None else torch.full((24,), value)
    save_file({**weights, "model.norm.weight": norm.to(dtype)}, path)


def put_nan(folder: Path) -> None:
    put_into_base(folder, torch.nan)


def put_a_large_value(folder: Path) -> None:
    put_into_base(folder, 1e5)


def put_integers(folder: Path) -> None:
    put_into_base(folder, dtype=torch.int8)


def add_tokens(folder: Path) -> None:
    """More of them than the base has rows to spare."""
    tokens = {f"<extra-{index}>": index for index in range(400, 450)}
    (folder / "base" / "tokenizer.json").unlink()
    (folder / "base" / "added_tokens.json").write_text(json.dumps(tokens))


def hide_transformers() -> None:
    sys.modules["transformers"] = None  # type: ignore[assignment]


def make_a_reward_model(folder: Path) -> None:
    path = folder / "tuned" / "config.json"
    path.write_text(path.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    (folder / "tuned" / "MODEL_COMPLETE").unlink()
    (folder / "tuned" / "state").rename(folder / "state-of-tuned")


def begin_answers(folder: Path) -> None:
    """With another seed."""
    (folder / "questions.jsonl").write_text(QUESTIONS)
    (folder / "answers.jsonl").write_text('{"line": 1, "sample": 0, "answer": ""}\n')
    (folder / "answers.jsonl.meta.json").write_text('{"seed": 7}')


CONVERTING = {
    "a command that tools/convert.py does not have": convert("exprt", "base", "--out", "new"),
    "nothing for tools/convert.py to do": convert(),
    "no model directory to look at": convert("inspect"),
    "a model to convert that is not there": convert("export", "bose", "--out", "new"),
    "nowhere to write a converted model": convert("export", "run"),
    "--out of a conversion holds something": convert("export", "run", "--out", "base"),
    "the checkpoint to be exported is not there": convert("export", "run", "--out", "new", "--step", 3),
    "a model with fewer rows than its tokenizer has ids": convert("import", "base", "--out", "new", spoil=add_tokens),
    "weights that are no numbers": convert("import", "base", "--out", "new", spoil=put_nan),
    "weights that are too large for the dtype": convert(
        "import", "base", "--out", "new", "--dtype", "float16", spoil=put_a_large_value
    ),
    "weights that were quantised": convert("import", "base", "--out", "new", spoil=put_integers),
    "a comparison without transformers": convert("verify", "base", before=hide_transformers),
}

CHATTING = {
    "nothing to chat with": chat("--model", "ckpt/sft"),
    "chatting with a reward model": chat(spoil=make_a_reward_model),
    "chatting with a model that has no template": chat("--model", "chat-base"),
    "chatting in another template than the model's": chat("--chat.template", "plain"),
    "chatting with a model without a tokenizer": chat("--model", "base", spoil={"base/*token*": None}),
    "a sampling option out of its range": chat("--sampling.top_p", 2),
    "a conversation longer than the model's context": chat("--context", 4096),
    "a file of questions that does not exist": chat("--input", "questions.jsonl", "--output", "answers.jsonl"),
    "questions without a file for the answers": chat("--input", "questions.jsonl"),
    "a file of questions that holds none": answer(spoil={"questions.jsonl": '{"题目": "头晕"}\n'}),
    "answers that were begun in another way": chat(
        "--input", "questions.jsonl", "--output", "answers.jsonl", spoil=begin_answers
    ),
    "a file of answers that something else made": answer(spoil={"answers.jsonl": "{}\n"}),
}

MISTAKES_TOOLS: dict[str, Mistake] = {**CONVERTING, **CHATTING}
