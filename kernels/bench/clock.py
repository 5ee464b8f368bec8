"""Clocks that let contenders take turns, on a GPU and on a processor.

What is timed is a round: one call on each of several sets of arguments, so that a call finds nothing of the last
one in the cache. Contenders take turns, a round each, in an order that turns round, so that whatever else the
machine does falls on all of them.

On a GPU a round lies between two events. Before it the cache is emptied by a read of more than it holds (a write
would leave lines that the round would have to write back), and before that the device is held back for as long as
the host needs to enqueue the round: a small kernel is timed, not Python. The host waits for nothing inside.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# Rounds of a contender: at least so many, as many as fit the time, and few when one takes more than half a second.
LEAST_ROUNDS, MOST_ROUNDS, LONG_ROUNDS = 20, 100, 5
SECONDS_A_CONTENDER, LONG_SECONDS = 0.25, 0.5
FLUSH_BYTES = 256 << 20  # several times the 60 MB of an H200's cache


@dataclass(frozen=True)
class Round:
    """What is timed: `run` makes `calls` calls."""

    run: Callable[[], None]
    calls: int


@dataclass(frozen=True)
class Times:
    """Milliseconds a call: median, and the 20th and 80th percentile, of so many rounds."""

    median: float
    p20: float
    p80: float
    rounds: int

    @staticmethod
    def of(milliseconds: list[float]) -> Times:
        if len(milliseconds) == 1:
            return Times(milliseconds[0], milliseconds[0], milliseconds[0], 1)
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return Times(statistics.median(milliseconds), fifths[0], fifths[3], len(milliseconds))


class Clock(Protocol):
    """Times rounds. `measures_memory` says whether `extra_peak` does."""

    measures_memory: bool

    def warm_up(self, run: Callable[[], None]) -> tuple[float, float]:
        """Run twice; the milliseconds of the second time: until the host had enqueued it, and until it was done."""

    def take(self, run: Callable[[], None], enqueue: float) -> Callable[[], float]:
        """Run once, with the milliseconds the host needs for it; those it took can be read after `finish`."""

    def finish(self) -> None:
        """Wait for everything taken."""

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """The result of a call, and the most bytes that were allocated at once beyond those before it."""


def race(
    clock: Clock, rounds: Mapping[str, Round], failed: Callable[[str, Exception], None] | None = None
) -> dict[str, Times]:
    """Time every contender's round, in turn.

    Args:
        failed: told of a contender that raises, which then drops out. Without it the error is raised.
    """
    runners: dict[str, _Runner] = {}
    for name, one in rounds.items():
        with _reported(name, runners, failed):
            enqueue, milliseconds = clock.warm_up(one.run)
            runners[name] = _Runner(one, enqueue, _rounds(milliseconds / 1e3), [])
    for index in range(max((runner.rounds for runner in runners.values()), default=0)):
        for name in list(runners) if index % 2 == 0 else list(reversed(runners)):
            runner = runners[name]
            if index < runner.rounds:
                with _reported(name, runners, failed):
                    runner.readings.append(clock.take(runner.round.run, runner.enqueue))
    clock.finish()
    return {
        name: Times.of([read() / runner.round.calls for read in runner.readings]) for name, runner in runners.items()
    }


@dataclass(frozen=True)
class _Runner:
    """A contender in a race. enqueue: milliseconds the host needs for a round."""

    round: Round
    enqueue: float
    rounds: int
    readings: list[Callable[[], float]]


@contextmanager
def _reported(
    name: str, runners: dict[str, _Runner], failed: Callable[[str, Exception], None] | None
) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a peer's code may raise anything
        if failed is None:
            raise
        runners.pop(name, None)
        failed(name, error)


def _rounds(seconds: float) -> int:
    if seconds > LONG_SECONDS:
        return LONG_ROUNDS
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, int(SECONDS_A_CONTENDER / max(seconds, 1e-9))))


class CpuClock:
    """Wall-clock time, for processors and for tests.

    Args:
        now: seconds.
    """

    measures_memory = False

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def warm_up(self, run: Callable[[], None]) -> tuple[float, float]:
        run()
        milliseconds = self.take(run, 0.0)()
        return milliseconds, milliseconds

    def take(self, run: Callable[[], None], enqueue: float) -> Callable[[], float]:
        begin = self._now()
        run()
        milliseconds = 1e3 * (self._now() - begin)
        return lambda: milliseconds

    def finish(self) -> None:
        pass

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        return run(), 0


class CudaClock:
    """Events on the current stream of the current device."""

    measures_memory = True
    # The longest that the device is held back. Whoever makes the host wait would only wait longer.
    MOST_HELD = 20.0

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
        self._sink = torch.empty((), device="cuda")
        self._cycles = self._cycles_a_millisecond()

    def warm_up(self, run: Callable[[], None]) -> tuple[float, float]:
        run()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        enqueued = time.perf_counter()
        torch.cuda.synchronize()
        return 1e3 * (enqueued - begin), 1e3 * (time.perf_counter() - begin)

    def take(self, run: Callable[[], None], enqueue: float) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(self.MOST_HELD, 1.5 * enqueue + 0.1) * self._cycles))
        torch.sum(self._flush, dim=0, out=self._sink)
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def finish(self) -> None:
        torch.cuda.synchronize()

    def peak(self, run: Callable[[], Any]) -> tuple[Any, int]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def _cycles_a_millisecond(self, cycles: int = 10_000_000) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(10):  # an idle chip's clock is slow, and takes a while to rise
            torch.cuda._sleep(cycles)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        return cycles / start.elapsed_time(end)
