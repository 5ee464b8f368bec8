"""A run of adapters that is killed at random moments ends as the run that nobody touched: dropout included."""

from __future__ import annotations

from pathlib import Path

from engine.conversations import ConversationDataConfig
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig, EvalConfig
from engine.lora import LoraConfig
from engine.manifest import stored_tensors
from engine.sft import SftConfig, SftTrainConfig, sft
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.small_base import write_small_base, write_small_conversations


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(tmp_path: Path) -> None:
    """From checkpoints that hold adapters and nothing of the base."""
    base, data = (
        write_small_base(tmp_path / "base", context=128),
        write_small_conversations(tmp_path / "chats.jsonl", 40),
    )

    def recipe(out: Path) -> SftConfig:
        return SftConfig(
            model=str(base),
            out=str(out),
            data=ConversationDataConfig(paths=[str(data)], workers=1),
            train=SftTrainConfig(steps=40, micro_batch_tokens=256, batch_tokens=512),
            lora=LoraConfig(rank=3, dropout=0.1),
            checkpoint=CheckpointConfig(every=3, keep=2),
            eval=EvalConfig(every=20, fraction=0.1),
            log=LogConfig(tensorboard=False, curves=False),
        )

    check_that_kills_leave_no_trace(sft, recipe, tmp_path, world=2, kills=4)
    stored = stored_tensors(tmp_path / "killed" / "state" / "step-00000040")
    kinds = {name.rpartition(".")[2] for name in stored if name.startswith("model.")}
    assert kinds == {"lora_a", "lora_b"}
