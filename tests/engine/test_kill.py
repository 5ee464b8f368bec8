"""A run that is killed, again and again, at random moments, ends as the run that nobody touched: bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.corpora import DataConfig
from engine.job import TrainConfig
from engine.loggers import LogConfig
from engine.loop import CheckpointConfig, EvalConfig
from engine.optim import OptimConfig
from engine.pretraining import PretrainConfig, pretrain
from engine.shard import Precision
from tests.engine.random_kills import check_that_kills_leave_no_trace
from tests.small_base import write_small_base, write_small_data


@pytest.mark.parametrize(
    ("world", "precision", "asynchronous"),
    [(1, "fp32", False), (1, "bf16", True), (2, "fp32", False), (2, "fp32", True)],
)
def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(
    tmp_path: Path, world: int, precision: Precision, asynchronous: bool
) -> None:
    base, data = write_small_base(tmp_path / "base"), write_small_data(tmp_path / "data.jsonl")

    def recipe(out: Path) -> PretrainConfig:
        return PretrainConfig(
            model=str(base),
            out=str(out),
            data=DataConfig(paths=[str(data)], workers=1),
            train=TrainConfig(steps=120, micro_batch_tokens=64, batch_tokens=256, precision=precision),
            optim=OptimConfig(lr=1e-3),
            checkpoint=CheckpointConfig(every=4, keep=2, asynchronous=asynchronous),
            eval=EvalConfig(every=10, fraction=0.1),
            log=LogConfig(tensorboard=False, curves=False),
        )

    check_that_kills_leave_no_trace(pretrain, recipe, tmp_path, world)
