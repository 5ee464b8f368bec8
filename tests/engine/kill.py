"""Killing a process at a chosen touch of the disk, and ranks at a random moment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.ranks import PATIENCE, _context, _rank_main, meeting_point

# What Python announces before it changes a directory or opens a file. os.fsync is not announced: see below.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def kill_at_touch(number: int, below: Path) -> Callable[[], int]:
    """From now on, SIGKILL this process just before it touches `below` for the `number`-th time.

    A touch is opening, creating, renaming, removing or flushing. Returns a function that counts them.
    """
    touches = 0

    def touch() -> None:
        nonlocal touches
        touches += 1
        if touches == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        # Deleting a tree names its files relative to an open directory, so relative names count too.
        if event in EVENTS and (str(arguments[0]).startswith(str(below)) or not str(arguments[0]).startswith("/")):
            touch()

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        touch()
        real_fsync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)
    return lambda: touches


def run_to_the_end_or_a_kill(function: Callable[..., None], *arguments: Any) -> bool:
    """Run a module-level function in a process of its own; True when it ended by itself."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode in (0, -signal.SIGKILL), f"the process ended with {process.exitcode}"
    return process.exitcode == 0


def run_ranks_and_kill(
    function: Callable[..., Any],
    world: int,
    *arguments: Any,
    once: Callable[[], bool],
    wait: float,
    victim: int,
    linger: float,
) -> None:
    """Start ranks; `wait` seconds after `once` turned true SIGKILL `victim`, and `linger` seconds later the others.

    A launcher takes its time to notice a dead rank; the others may run into errors meanwhile.
    """
    store, results = meeting_point(), _context.Queue()
    ranks = [
        _context.Process(target=_rank_main, args=(function, rank, world, store.port, arguments, results))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + PATIENCE
    while not once():
        assert all(rank.is_alive() for rank in ranks), "a rank ended before it was killed"
        assert time.monotonic() < deadline, "the ranks never got going"
        time.sleep(0.002)
    time.sleep(wait)
    ranks[victim].kill()
    time.sleep(linger)
    for rank in ranks:
        rank.kill()
        rank.join(10)
