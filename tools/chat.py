"""Chat with a model directory, or have it answer a file of questions.

    python tools/chat.py --model ckpt/sft
    python tools/chat.py --model ckpt/sft --input questions.jsonl --output answers.jsonl

In batch mode the same command goes on where it was interrupted. docs/chatting.md tells more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.batch_chat import BatchOptions, answer_file
from engine.chatting import DISCLAIMER, Chat, ChatModel, SamplingConfig
from engine.launch import run, speak
from engine.terminal_chat import talk
from model.errors import InputError


@dataclass
class TemplateConfig:
    """How conversations are written down."""

    template: str = "auto"
    """auto: the one stored beside the model; or a name, or a .jinja file, where none is"""


@dataclass
class InputConfig:
    """How records become prompts, in batch mode."""

    keys: dict[str, str] = field(default_factory=dict)
    """what fields mean, where the schema is not known by itself: user=ask; + joins fields"""


@dataclass
class ChatConfig:
    """Chat with a model, or have it answer a file of questions."""

    model: str = "ckpt/sft"
    """Hugging Face model directory, such as fine-tuning leaves"""
    system: str | None = None
    """system message; by default there is none"""
    seed: int = 0
    """of all draws"""
    device: str | None = None
    """cuda, cuda:1 or cpu; by default the GPU if there is one"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """of weights and cache; auto: bfloat16 on a GPU, float32 on a CPU"""
    context: int | None = None
    """longest conversation in tokens; by default the model's"""
    input: str | None = None
    """file of questions: batch mode"""
    output: str | None = None
    """file of answers, as JSON lines; what it holds already is kept, and the rest is added"""
    samples: int = 1
    """answers to each question, in batch mode"""
    max_rows: int = 64
    """answers that are written at once, in batch mode"""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    chat: TemplateConfig = field(default_factory=TemplateConfig)
    data: InputConfig = field(default_factory=InputConfig)


def main(config: ChatConfig) -> int:
    config.sampling.options(())  # before the weights are read
    if (config.input is None) != (config.output is None):
        raise InputError("Batch mode takes --input FILE and --output FILE. Give both, or neither to chat.")
    if config.max_rows < 1:
        raise InputError(f"--max_rows is {config.max_rows}. Use at least 1.")
    if config.input is None or config.output is None:
        model = open_model(config, max_rows=1)
        return talk(Chat(model, config.sampling, config.system or "", config.seed))
    asked = BatchOptions(config.input, config.sampling, config.samples, config.seed, config.system, config.data.keys)
    asked.check()
    written = answer_file(open_model(config, config.max_rows), asked, Path(config.output), config.max_rows)
    print(f"{config.output}: {written:,} answers written")
    return 0


def open_model(config: ChatConfig, max_rows: int) -> ChatModel:
    model = ChatModel.open(
        config.model,
        config.chat.template,
        device=config.device,
        dtype=config.dtype,
        context=config.context,
        max_rows=max_rows,
    )
    speak(DISCLAIMER)
    return model


if __name__ == "__main__":
    run(main, ChatConfig)
