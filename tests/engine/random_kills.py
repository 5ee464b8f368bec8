"""Killing a run of any job again and again, at random moments, and comparing it with one that nobody touched."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file

import engine.building
from engine.job import JobConfig
from engine.loggers import read_rows
from tests.ranks import PATIENCE, start_ranks

KILLS = 8
CLOCK = ("tokens_per_second", "mfu", "memory_bytes", "data_wait_share")


def check_that_kills_leave_no_trace(
    job: Callable[..., None], recipe: Callable[[Path], JobConfig], folder: Path, world: int, kills: int = KILLS
) -> None:
    """Run a job unbroken and killed, in two directories of `folder`, and compare all that it computed, bit by bit.

    Args:
        job: takes a recipe; importable.
        recipe: gives the recipe for an --out, with `train.steps` set and steps quicker than 0.1 s.
    """
    unbroken, killed = folder / "unbroken", folder / "killed"
    steps = recipe(killed).train.steps
    assert steps is not None
    _run_to_the_end(start_ranks(job, world, recipe(unbroken)))
    chance = random.Random(f"{job.__name__} {world}")
    reached: list[str] = []
    while len(reached) < kills and f"step-{steps:08d}" not in reached:
        processes = start_ranks(_never_ends, world, job, recipe(killed))
        _wait_for_rows(killed, _last_step(killed), chance.randint(1, 9), steps, reached, processes)
        time.sleep(chance.uniform(0, 0.1))
        assert all(process.is_alive() for process in processes), "a rank ended before it was killed"
        victim = chance.choice(processes)
        if chance.random() < 0.5:
            _kill(victim)
            time.sleep(chance.uniform(0, 0.1))  # the other ranks go on alone for a moment, then torchrun ends them
        for process in processes:
            _kill(process)
        reached += [_newest_checkpoint(killed)]
    assert len(set(reached)) >= 3, f"the kills must fall between checkpoints to prove anything: {reached}"
    _run_to_the_end(start_ranks(job, world, recipe(killed)))
    _compare(unbroken, killed, steps)


def _never_ends(job: Callable[[JobConfig], None], config: JobConfig) -> None:
    """A job that stops before it publishes its model, so that no kill, however late, comes after its end."""

    def wait_to_be_killed(*_: object, **__: object) -> None:
        while True:
            signal.pause()

    engine.building.publish = wait_to_be_killed  # type: ignore[assignment]
    job(config)


def _run_to_the_end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _trace(directory: Path) -> list[dict]:
    """What training computed, without what the clock says."""
    return [
        {name: value for name, value in row.items() if name not in CLOCK and not name.startswith("seconds/")}
        for row in read_rows(directory / "metrics.jsonl")
    ]


def _last_step(directory: Path) -> int:
    rows = _trace(directory) if (directory / "metrics.jsonl").exists() else []
    return max((row["step"] for row in rows), default=0)


def _newest_checkpoint(directory: Path) -> str:
    return max((path.parent.name for path in directory.glob("state/step-*/COMPLETE")), default="none")


def _wait_for_rows(
    directory: Path, beyond: int, count: int, steps: int, reached: list[str], processes: list[BaseProcess]
) -> None:
    """Until the run has come `count` steps further than the one before it, and has saved what that one had not."""
    goal = min(beyond + count, steps - 2)
    deadline = time.monotonic() + PATIENCE
    while _last_step(directory) < goal or (reached and _newest_checkpoint(directory) <= reached[-1]):
        assert all(process.is_alive() for process in processes), "a rank ended before it was killed"
        assert time.monotonic() < deadline, "the ranks never got going"
        time.sleep(0.02)


def _kill(process: BaseProcess) -> None:
    process.kill()  # a rank that has died of its neighbour's death meanwhile is no error
    process.join()


def _compare(one: Path, other: Path, steps: int) -> None:
    assert _trace(other) == _trace(one)
    (weights,) = (path.name for path in one.glob("*model.safetensors"))  # of a model, or of an adapter
    assert (other / weights).read_bytes() == (one / weights).read_bytes()
    if (one / "samples.jsonl").exists():
        assert (other / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()
    last = f"state/step-{steps:08d}"
    for shard in sorted((one / last).glob("*.safetensors")):
        # The header lists tensors in no fixed order.
        expected, found = load_file(shard), load_file(other / last / shard.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected), shard.name
