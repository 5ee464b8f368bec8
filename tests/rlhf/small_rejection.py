"""A rejection-sampling job of seconds: a model that answers, prompts, and judges of its answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from engine.conversations import ConversationDataConfig
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig, EvalConfig
from engine.optim import OptimConfig
from engine.sft import SftConfig, SftTrainConfig, sft
from rlhf.rejection_config import DrawConfig, HeldOutConfig, RejectionConfig
from rlhf.sampling_config import PromptDataConfig
from rlhf.scores import Answer
from tests.rlhf.small_reward import write_small_sft
from tests.small_base import ADVICE, SUBJECTS

CONTEXT = 64


def likes_rest(answers: list[Answer]) -> list[float]:
    """A reward function: how often 休 and 息 are in an answer, and that it is short."""
    return [answer.text.count("休") + answer.text.count("息") - 0.01 * len(answer.text) for answer in answers]


def counts_fields(answers: list[Answer]) -> list[float]:
    """A reward function that knows what the record says of its prompt."""
    return [float(answer.fields["number"]) for answer in answers]


def write_small_rejection(folder: Path) -> Path:
    """`folder`/fresh, whose answers end one token in 400; `folder`/sft, tuned until they do; `folder`/prompts.jsonl."""
    write_small_sft(folder / "fresh", CONTEXT)
    chats = [
        {"messages": [{"role": "user", "content": ask(number)}, {"role": "assistant", "content": answer(number)}]}
        for number in range(120)
    ]
    _write(folder / "chats.jsonl", chats)
    _write(folder / "prompts.jsonl", [{"prompt": ask(number), "number": number} for number in range(24)])
    sft(
        SftConfig(
            model=str(folder / "fresh"),
            out=str(folder / "sft"),
            data=ConversationDataConfig(paths=[str(folder / "chats.jsonl")], workers=1),
            train=SftTrainConfig(steps=50, micro_batch_tokens=256, batch_tokens=256),
            optim=OptimConfig(lr=2e-2),
            eval=EvalConfig(every=0, fraction=0.0),
            log=LogConfig(tensorboard=False, curves=False),
        )
    )
    return folder


def ask(number: int) -> str:
    return f"患者{number}，{SUBJECTS[number % 8]}，怎么办？"


def answer(number: int) -> str:
    return f"{ADVICE[number % 6]}，{ADVICE[number // 6 % 6]}。"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def small_rejection(folder: Path, out: Path, **changes: Any) -> RejectionConfig:
    """Two rounds of 4 answers a prompt, some 8 prompts a chunk; some prompts are held out."""
    config = RejectionConfig(
        model=str(folder / "sft"),
        out=str(out),
        reward="tests.rlhf.small_rejection:likes_rest",
        rounds=2,
        rollout=DrawConfig(samples=4, max_new_tokens=16, chunk=32),
        train=SftTrainConfig(steps=8, micro_batch_tokens=128, batch_tokens=256),
        optim=OptimConfig(lr=3e-3),
        checkpoint=CheckpointConfig(every=2),
        eval=HeldOutConfig(fraction=0.2),
        log=LogConfig(tensorboard=False, curves=False),
        data=PromptDataConfig(paths=[str(folder / "prompts.jsonl")]),
    )
    return dataclasses.replace(config, **changes)
