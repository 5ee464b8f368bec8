"""A run that hangs ends with stacks; a slow rank is named; a signal only raises a flag."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine import watchdog
from engine.signals import StopSignals
from engine.watchdog import Stragglers
from tests.ranks import PATIENCE

HANG = """
import time
from types import SimpleNamespace
from engine import watchdog

clock = 0.0
watchdog.time = SimpleNamespace(monotonic=lambda: clock)  # a loaded machine's own would run on while it sleeps

def waits_for_a_rank_that_is_gone():
    global clock
    clock += 0.5
    time.sleep(3600)

with watchdog.Watchdog(0.4, "rank 3 (node7, cuda:3)") as dog:
    for _ in range(4):
        dog.beat("in step 41")
        clock += 0.3
        time.sleep(0.3)
    dog.beat("in step 42")
    waits_for_a_rank_that_is_gone()
"""


def test_a_run_that_hangs_ends_with_its_stack_and_says_where() -> None:
    ended = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert "rank 3 (node7, cuda:3) has not moved" in ended.stderr
    assert "while in step 42" in ended.stderr
    assert "waits_for_a_rank_that_is_gone" in ended.stderr


class Clock:
    """Time passes when it is told to."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


class Busy(nn.Module):
    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.seconds += self.seconds
        return x


def test_the_busy_clock_counts_the_blocks_and_nothing_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Clock()
    monkeypatch.setattr(watchdog, "time", now)
    blocks = [Busy(now, 2.0), Busy(now, 3.0)]
    clock = watchdog.BusyClock(blocks, torch.device("cpu"))
    x = torch.zeros(1)
    blocks[0](x)
    assert clock.take() == 0, "not running"
    clock.is_running = True
    for block in blocks:
        block(x)
        now.seconds += 20
    assert clock.take() == 5
    with torch.no_grad():
        blocks[0](x)
    assert clock.take() == 0, "evaluation is not training"


def test_a_rank_that_stays_slow_is_named_once() -> None:
    stragglers = Stragglers(4)
    usual, slow = [1.0, 1.1, 0.9, 1.0], [1.0, 1.1, 1.7, 1.0]
    said = [stragglers.look(busy) for busy in [slow, slow, usual, slow, slow, slow, slow]]
    assert said[:5] == [None] * 5 and said[6] is None
    assert said[5] is not None and said[5].startswith("rank 2 is slow: busy 1.70 s a step where the others need 1.00 s")


def test_one_slow_rank_of_two_is_named_too() -> None:
    stragglers = Stragglers(2)
    assert [stragglers.look([0.5, 1.0]) for _ in range(3)][2].startswith("rank 1 is slow")  # type: ignore[union-attr]
    assert [Stragglers(1).look([1.0]) for _ in range(5)] == [None] * 5


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)])
def test_a_signal_raises_a_flag_says_so_once_and_gives_the_exit_code(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.wants_stop
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # the terminal and torchrun may both deliver it
        assert signals.wants_stop and signals.exit_code == code
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.split() == f"{number.name}: saving after this step, then stopping.".split()
