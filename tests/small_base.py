"""A model directory small enough to train in milliseconds, and text for it, for tests of whole jobs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from model.config import PRESETS, ModelConfig, parameter_shapes
from model.hf import write_model
from model.init import initial_value
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_sentencepiece

SUBJECTS = ["高血压", "糖尿病", "支气管哮喘", "慢性胃炎", "偏头痛", "缺铁性贫血", "湿疹", "肺炎"]
FINDINGS = ["头晕", "乏力", "咳嗽", "腹痛", "皮疹", "发热", "口渴", "心悸", "气促", "恶心"]
ADVICE = ["注意休息", "低盐饮食", "按时服药", "定期复查", "避免受凉", "适量运动"]


def small_texts(count: int = 400) -> list[str]:
    """Distinct made-up notes of very different lengths."""
    texts = []
    for number in range(count):
        subject = SUBJECTS[number % len(SUBJECTS)]
        findings = [FINDINGS[(number * step) % len(FINDINGS)] for step in range(1, 2 + number % 7)]
        advice = [ADVICE[(number + step) % len(ADVICE)] for step in range(number % 4)]
        texts.append(
            f"病例{number}：患者因{'、'.join(findings)}就诊，诊断为{subject}。" + "，".join(advice) * (number % 5)
        )
    return texts


def small_conversations(count: int = 300) -> list[list[dict[str, str]]]:
    """Distinct made-up consultations of one to four turns, as messages of role and content."""
    conversations = []
    for number in range(count):
        subject = SUBJECTS[number % len(SUBJECTS)]
        messages = [{"role": "system", "content": "你是医生。"}] if number % 5 == 0 else []
        for turn in range(1 + number % 4):
            finding, advice = FINDINGS[(number + turn) % len(FINDINGS)], ADVICE[(number * 7 + turn) % len(ADVICE)]
            question = (
                f"患者{number}，{finding}{'，还有乏力' * (number % 3)}，怎么办？" if turn == 0 else f"{finding}呢？"
            )
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": f"可能是{subject}，{advice}。"})
        conversations.append(messages)
    return conversations


def write_small_conversations(path: Path, count: int = 300) -> Path:
    """Those consultations as JSON lines."""
    rows = ({"messages": messages} for messages in small_conversations(count))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_small_data(path: Path, count: int = 400) -> Path:
    """Those notes as JSON lines."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in small_texts(count)))
    return path


def small_config(vocab_size: int, context: int = 32) -> ModelConfig:
    """27 thousand parameters."""
    return dataclasses.replace(
        PRESETS["tiny"],
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=48,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=context,
    )


def write_small_base(directory: Path, context: int = 32) -> Path:
    """A Hugging Face directory with fresh weights in fp32 and its tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_sentencepiece(train_sentencepiece(small_texts(), 400, is_limit_soft=True), {})
    config = dataclasses.replace(
        small_config(tokenizer.padded_vocab_size, context),
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    shapes = parameter_shapes(config)
    weights = ((name, initial_value(config, name, shape, 0)) for name, shape in shapes.items())
    write_model(directory, config, weights, torch.float32)
    tokenizer.save(directory)
    return directory
