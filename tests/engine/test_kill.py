"""A run that is killed, again and again, at random moments, ends as the run that nobody touched: bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.corpora import DataConfig
from engine.job import TrainConfig
from engine.loggers import LogConfig, read_rows
from engine.loop import CheckpointConfig, EvalConfig
from engine.optim import OptimConfig
from engine.pretraining import PretrainConfig, pretrain
from tests.ranks import start_ranks
from tests.small_base import write_small_base, write_small_data

STEPS = 120
KILLS = 8


def recipe(folder: Path, out: Path, asynchronous: bool) -> PretrainConfig:
    return PretrainConfig(
        model=str(folder / "base"),
        out=str(out),
        data=DataConfig(paths=[str(folder / "data.jsonl")], workers=1),
        train=TrainConfig(steps=STEPS, micro_batch_tokens=64, batch_tokens=256),
        optim=OptimConfig(lr=1e-3),
        checkpoint=CheckpointConfig(every=4, keep=2, asynchronous=asynchronous),
        eval=EvalConfig(every=10, fraction=0.1),
        log=LogConfig(tensorboard=False, curves=False),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    write_small_base(folder / "base")
    write_small_data(folder / "data.jsonl")
    return folder


def run_to_the_end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(timeout=100)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def trace(directory: Path) -> list[tuple]:
    """What training computed, without what the clock says."""
    names = ("step", "loss", "grad_norm", "lr", "tokens", "held_out_loss")
    return [tuple(row.get(name) for name in names) for row in read_rows(directory / "metrics.jsonl")]


def last_step(directory: Path) -> int:
    rows = trace(directory) if (directory / "metrics.jsonl").exists() else []
    return max((row[0] for row in rows), default=0)


def newest_checkpoint(directory: Path) -> str:
    return max((path.parent.name for path in directory.glob("state/step-*/COMPLETE")), default="none")


def wait_for_rows(directory: Path, beyond: int, count: int, processes: list[BaseProcess]) -> None:
    """Until the run has come `count` steps further than the one before it, or as far as the next save."""
    goal = min(beyond + count, STEPS - 2)
    newest = newest_checkpoint(directory)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(process.is_alive() for process in processes):
        if last_step(directory) >= goal and (newest == "none" or newest_checkpoint(directory) > newest):
            return
        time.sleep(0.02)


def kill(process: BaseProcess) -> None:
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()


def assert_same_run(one: Path, other: Path) -> None:
    assert trace(other) == trace(one)
    assert (other / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    last = f"state/step-{STEPS:08d}"
    for shard in sorted((one / last).glob("*.safetensors")):
        # The header lists tensors in no fixed order.
        expected, found = load_file(shard), load_file(other / last / shard.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), shard.name


@pytest.mark.parametrize(("world", "asynchronous"), [(1, False), (2, False), (2, True)])
def test_a_run_killed_at_random_moments_ends_bitwise_as_an_unbroken_one(
    folder: Path, world: int, asynchronous: bool
) -> None:
    unbroken, killed = folder / f"unbroken-{world}-{asynchronous}", folder / f"killed-{world}-{asynchronous}"
    run_to_the_end(start_ranks(pretrain, world, recipe(folder, unbroken, asynchronous)))
    chance = random.Random(f"{world} {asynchronous}")
    reached: list[str] = []
    for _ in range(KILLS):
        processes = start_ranks(pretrain, world, recipe(folder, killed, asynchronous))
        wait_for_rows(killed, beyond=last_step(killed), count=chance.randint(1, 9), processes=processes)
        time.sleep(chance.uniform(0, 0.1))
        assert any(process.is_alive() for process in processes), "killed too late to prove anything"
        victim = chance.choice(processes)
        if chance.random() < 0.5:
            kill(victim)
            time.sleep(chance.uniform(0, 0.1))  # the other ranks go on alone for a moment, then torchrun ends them
        for process in processes:
            kill(process)
        reached += [newest_checkpoint(killed)]
    assert len(set(reached)) >= 3, f"the kills must fall between checkpoints to prove anything: {reached}"
    run_to_the_end(start_ranks(pretrain, world, recipe(folder, killed, asynchronous)))
    assert_same_run(unbroken, killed)
