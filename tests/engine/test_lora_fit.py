"""What adapters have room for: whole jobs of fine-tuning on bundled conversations, learnt by heart or not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from engine.conversations import ConversationDataConfig
from engine.loggers import LogConfig, read_rows
from engine.loop import CheckpointConfig, EvalConfig
from engine.lora import LoraConfig
from engine.optim import OptimConfig
from engine.sft import SftConfig, SftTrainConfig, sft
from model.config import parameter_shapes
from model.hf import write_model
from model.init import initial_value
from model.tokenizer import Tokenizer
from model.tokenizer_training import train_sentencepiece
from samples.dialogues import render_dialogues
from samples.knowledge import load_knowledge
from tests.small_base import small_config

WIDTH = 64
STEPS = 150
"""Of 1,024 tokens: the conversations come by fifty times."""


def write_job(folder: Path) -> None:
    """32 bundled conversations of all kinds, and a base of two layers that has never been trained."""
    training, _ = render_dialogues(load_knowledge())
    chosen = training[:: len(training) // 32][:32]
    rows = [{"messages": [asdict(message) for message in dialogue.messages]} for dialogue in chosen]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    texts = [message.content for dialogue in chosen for message in dialogue.messages]
    tokenizer = Tokenizer.from_sentencepiece(train_sentencepiece(texts, 1000, is_limit_soft=True), {})
    config = replace(
        small_config(tokenizer.padded_vocab_size, 256),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        head_dim=WIDTH // 2,
        initializer_range=0.3,  # a head that is never trained needs weights that can tell words apart
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    values = ((name, initial_value(config, name, shape, 0)) for name, shape in parameter_shapes(config).items())
    write_model(folder / "base", config, values, torch.float32)
    tokenizer.save(folder / "base")


def fitted(folder: Path, out: str, lora: LoraConfig) -> float:
    """Mean loss a trained token of the last epoch."""
    config = SftConfig(
        model=str(folder / "base"),
        out=str(folder / out),
        data=ConversationDataConfig(paths=[str(folder / "chats.jsonl")], workers=1),
        train=SftTrainConfig(steps=STEPS, micro_batch_tokens=1024, batch_tokens=1024),
        optim=OptimConfig(lr=0.01, weight_decay=0.0),
        lora=lora,
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(fraction=0.0),
        log=LogConfig(tensorboard=False, curves=False),
    )
    sft(config)
    losses = [row["loss"] for row in read_rows(folder / out / "metrics.jsonl") if "loss" in row]
    assert len(losses) == STEPS
    return sum(losses[-3:]) / 3


def test_a_rank_of_full_width_fits_the_bundled_conversations_as_full_training_does(tmp_path: Path) -> None:
    """To nine tenths of the probability of every trained token; rank 1 on queries alone is nowhere near."""
    write_job(tmp_path)
    assert fitted(tmp_path, "full", LoraConfig()) < 0.1
    assert fitted(tmp_path, "adapters", LoraConfig(rank=WIDTH)) < 0.1
    assert fitted(tmp_path, "thin", LoraConfig(rank=1, targets=["q_proj"])) > 1.0
