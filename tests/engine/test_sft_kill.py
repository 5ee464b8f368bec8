"""A fine-tuning run that is killed at random moments ends as the run that nobody touched: noise included."""

from __future__ import annotations

from pathlib import Path

from engine.conversations import ConversationDataConfig
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig, EvalConfig
from engine.optim import OptimConfig
from engine.sft import SftConfig, SftTrainConfig, sft
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.small_base import write_small_base, write_small_conversations


def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(tmp_path: Path) -> None:
    base, data = (
        write_small_base(tmp_path / "base", context=128),
        write_small_conversations(tmp_path / "chats.jsonl", 40),
    )

    def recipe(out: Path) -> SftConfig:
        return SftConfig(
            model=str(base),
            out=str(out),
            data=ConversationDataConfig(paths=[str(data)], workers=1),
            # More than an epoch: 40 conversations fill some 15 packs.
            train=SftTrainConfig(steps=40, micro_batch_tokens=256, batch_tokens=512, neftune_alpha=5.0),
            optim=OptimConfig(lr=1e-3),
            checkpoint=CheckpointConfig(every=3, keep=2),
            eval=EvalConfig(every=20, fraction=0.1),
            log=LogConfig(tensorboard=False, curves=False),
        )

    check_that_kills_leave_no_trace(sft, recipe, tmp_path, world=2, kills=4)
