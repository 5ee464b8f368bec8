"""Killed at any touch of the disk, a run has a complete checkpoint that loads bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from engine.checkpoint import Checkpointer
from tests.engine.kill import kill_at_touch, run_ranks_and_kill, run_to_the_end_or_a_kill
from tests.engine.training_state import blank, differences, full_state, mesh_of, sharded, trainer_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save_steps(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, full_state(step), trainer_state(step))
    checkpointer.wait()


def check_all(checkpointer: Checkpointer) -> None:
    """Whatever looks complete is: the one before the newest is what a damaged newest one falls back to."""
    for step in checkpointer.steps():
        state = blank(None)
        assert checkpointer.load(step, state) == trainer_state(step)
        assert differences(state, step) == []


def resume(run_dir: Path) -> int:
    """What the next start does: find the newest checkpoint, load it, and go on to the next save."""
    checkpointer = Checkpointer(run_dir, keep=1)
    newest = checkpointer.latest()
    assert newest is not None, "no checkpoint is left"
    check_all(checkpointer)
    save_steps(checkpointer, newest + 100)
    assert [path.name for path in checkpointer.state_dir.iterdir()] == [f"step-{newest + 100:08d}"]
    return newest


def save_until_killed(run_dir: str, touch: int, asynchronous: bool) -> None:
    checkpointer = Checkpointer(run_dir, keep=1, asynchronous=asynchronous)
    kill_at_touch(touch, Path(run_dir))
    save_steps(checkpointer, 2)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_kill_at_every_touch_of_the_disk_leaves_a_whole_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    """The save of step 2 removes the leftovers of a kill, writes, completes and removes step 1: all of that is cut."""
    before = tmp_path / "before"
    save_steps(Checkpointer(before), 1)
    for leftover in ("step-00000002", "step-00000000.deleted"):
        shutil.copytree(before / "state" / "step-00000001", before / "state" / leftover)
        (before / "state" / leftover / "COMPLETE").unlink()
    newest: list[int] = []
    while True:
        run_dir = tmp_path / f"killed-at-{len(newest) + 1}"
        shutil.copytree(before, run_dir)
        ended = run_to_the_end_or_a_kill(save_until_killed, str(run_dir), len(newest) + 1, asynchronous)
        newest.append(resume(run_dir))
        if ended:
            break
    # Step 1 first, then, from the moment COMPLETE has its name, step 2; never back.
    assert newest == sorted(newest)
    assert set(newest) == {1, 2}
    assert newest.count(1) > 20
    assert newest.count(2) > 5


def train_forever(run_dir: str, seed: int) -> None:
    """Resume, check, and save step after step until killed."""
    mesh = mesh_of(1)
    checkpointer = Checkpointer(run_dir, keep=2, asynchronous=seed % 2 == 0)
    step = checkpointer.latest() or 0
    if step:
        state = blank(mesh)
        assert checkpointer.load(step, state) == trainer_state(step)
        assert differences(state, step) == []
    while True:
        step += 1
        checkpointer.save(step, sharded(full_state(step), mesh), trainer_state(step))


def test_ranks_killed_at_random_moments_resume_from_a_whole_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(2)
    probe = Checkpointer(tmp_path)
    newest, torn = 0, 0

    def has_saved() -> bool:
        return max(probe.steps(), default=0) > newest

    for kill in range(30):
        world = 1 if kill % 5 == 4 else 2
        run_ranks_and_kill(
            train_forever,
            world,
            str(tmp_path),
            kill,
            once=has_saved,
            wait=chance.uniform(0, 0.05),
            victim=chance.randrange(world),
            linger=chance.choice([0, 0.02]),
        )
        found = probe.latest()
        assert found is not None and found > newest
        newest = found
        check_all(probe)
        torn += any(not (path / "COMPLETE").exists() for path in probe.state_dir.iterdir())
    assert torn > 0, "no kill fell into a save"
