"""Conversations of many lengths, each with a first question of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.conversation_files import ConversationOptions
from engine.data.encoders import ChatEncoder
from engine.data.prepare import prepare
from model.chat import ChatTemplate
from model.tokenizer import Tokenizer

_WORDS = "患者血压偏高应低盐饮食按时服药定期复诊并监测血糖注意休息必要时就医"


def dialogues(count: int, seed: int = 0, most_turns: int = 3, most_characters: int = 60) -> list[dict[str, Any]]:
    """ShareGPT records of 1 to `most_turns` questions with answers."""
    chance = np.random.default_rng(seed)
    records = []
    for number in range(count):
        turns = []
        for turn in range(int(chance.integers(1, most_turns + 1))):
            question, answer = (made_up_text(chance, most_characters) for _ in range(2))
            turns.append({"from": "human", "value": f"第{seed}之{number}问：{question}" if turn == 0 else question})
            turns.append({"from": "gpt", "value": answer})
        records.append({"conversations": turns})
    return records


def made_up_text(chance: np.random.Generator, most: int) -> str:
    length = int(np.clip(chance.lognormal(2.5, 0.8), 1, most))
    return "".join(chance.choice(list(_WORDS), length))


def write(path: Path, records: list[Any]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat_encoder(tokenizer: Tokenizer, context: int = 128, template: str = "chimed") -> ChatEncoder:
    return ChatEncoder(ChatTemplate.named(template, tokenizer), tokenizer, context)


def prepare_records(
    directory: Path, records: list[Any], tokenizer: Tokenizer, context: int = 128, **options: Any
) -> Path:
    """A prepared directory of conversations."""
    directory.mkdir()
    raw = write(directory / "raw.jsonl", records)
    encoder = chat_encoder(tokenizer, context)
    return prepare([raw], encoder, directory / "prepared", ConversationOptions(**options), workers=1)
