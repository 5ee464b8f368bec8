"""Contenders measured: warmed up, timed in laps of several steps, their memory, and where the time of a step goes.

On a GPU each has the device to itself, one after another: two 7b models with their masters do not fit together. Ours
runs first and once more at the end, which shows whether the device became slower meanwhile. On a CPU, whose other work
comes and goes, all take their laps in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from engine.benchmark import Lap, free, now, turns
from tools.train_data import Step
from tools.train_parts import Parts, parts, trace

OURS = "ours"


class Contender(Protocol):
    """A model in training. settings: how it runs, in a few words."""

    @property
    def settings(self) -> str: ...
    @property
    def padding_share(self) -> float: ...
    @property
    def data_wait(self) -> float:
        """Seconds that the last step waited for its data."""

    def step(self) -> None:
        """One optimizer step; whoever wants it done waits for the device."""

    def close(self) -> None: ...


@dataclass
class Sizes:
    """How long a contender is measured.

    warm: steps before anything is timed. steps: of a lap. laps: of a contender each time it runs.
    traced: steps under the profiler; 0 for none.
    """

    warm: int = 2
    steps: int = 2
    laps: int = 3
    traced: int = 2

    @property
    def total(self) -> int:
        """Steps that a contender takes."""
        return self.warm + self.steps * self.laps + self.traced


@dataclass
class Outcome:
    """What a contender did; what was measured before a failure stays.

    peak: bytes on a GPU, without what was there before. failure: what ended it before its time.
    """

    settings: str = ""
    laps: list[Lap] = field(default_factory=list)
    peak: int | None = None
    padding: float = 0.0
    parts: Parts | None = None
    failure: str = ""


class _Runner:
    """A contender whose outcome grows: its laps read the tokens of a step from the steps that all take.

    Whatever fails, the contender is closed.
    """

    def __init__(
        self,
        build: Callable[[], Contender],
        outcome: Outcome,
        steps: list[Step],
        sizes: Sizes,
        device: torch.device,
        vocabulary: int,
    ) -> None:
        self._outcome, self._steps, self._sizes = outcome, steps, sizes
        self._device, self._vocabulary = device, vocabulary
        self._taken, self._waited = 0, 0.0
        self._before = _allocated(device)
        self._contender = build()
        outcome.settings = self._contender.settings
        with self._closed_on_failure():
            self._take(sizes.warm)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def _take(self, count: int) -> int:
        """So many steps; their real tokens."""
        tokens = 0
        for _ in range(count):
            tokens += self._steps[self._taken % len(self._steps)].tokens
            self._taken += 1
            self._contender.step()
            self._waited += self._contender.data_wait
        now(self._device)
        return tokens

    def lap(self) -> None:
        with self._closed_on_failure():
            begin, waited = now(self._device), self._waited
            tokens = self._take(self._sizes.steps)
            self._outcome.laps.append(Lap(tokens, time.perf_counter() - begin, self._waited - waited))

    def finish(self) -> None:
        """Read off what is left, look where the time goes, and close."""
        outcome = self._outcome
        with self._closed_on_failure():
            outcome.padding = self._contender.padding_share
            if self._device.type == "cuda":
                outcome.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            if self._sizes.traced and outcome.parts is None:
                events = trace(self._contender.step, self._sizes.traced, self._device)
                outcome.parts = parts(events, self._sizes.traced, self._vocabulary)
        self._contender.close()

    @contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._contender.close()
            raise


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(
    builders: dict[str, Callable[[], Contender]],
    steps: list[Step],
    sizes: Sizes,
    device: torch.device,
    vocabulary: int,
    has_time: Callable[[], bool],
) -> Iterator[tuple[str, Outcome]]:
    """Run every contender, as this file says for the device, and tell each outcome as soon as it is known.

    Args:
        builders: by name, OURS first.
        vocabulary: rows of the head.
        has_time: asked before a contender begins, but for the first; those that are not begun have no outcome.
    Yields:
        name and outcome; on a GPU OURS a second time, with the laps of both turns. What a peer raises ends that peer
        and is said in its outcome; so is what ours raises once it has had all laps of a turn.
    Raises:
        what ours raised before, such as torch.cuda.OutOfMemoryError: on a GPU nobody else was tried then.
    """
    outcomes: dict[str, Outcome] = {}

    def runner(name: str) -> _Runner:
        return _Runner(builders[name], outcomes[name], steps, sizes, device, vocabulary)

    def attempt(name: str, work: Callable[[], None]) -> None:
        outcome = outcomes.setdefault(name, Outcome())
        try:
            return work()
        except Exception as error:
            if name == OURS and len(outcome.laps) < sizes.laps:
                raise
            outcome.failure = _reason(error, len(outcome.laps))
        # Not before the exception is gone, and with its traceback the frames that hold the model.
        free()

    if device.type == "cuda":
        for name in [*builders, OURS] if len(builders) > 1 else builders:
            if outcomes and not has_time():
                return
            attempt(name, lambda: _alone(runner(name), sizes))  # noqa: B023  called at once
            yield name, outcomes[name]
        return
    racing: dict[str, _Runner] = {}
    for name in builders:
        attempt(name, lambda: racing.update({name: runner(name)}))  # noqa: B023
    for name in turns(list(racing), sizes.laps):
        if not outcomes[name].failure:
            attempt(name, racing[name].lap)
    for name, outcome in outcomes.items():
        if not outcome.failure:
            attempt(name, racing[name].finish)
        yield name, outcome


def _alone(runner: _Runner, sizes: Sizes) -> None:
    for _ in range(sizes.laps):
        runner.lap()
    runner.finish()


def _reason(error: Exception, laps: int) -> str:
    """In a line, with the laps that were taken before."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        told = "out of memory" if laps else "does not fit"
    else:
        told = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return told + (f" (after {laps} lap{'s' if laps > 1 else ''})" if laps else "")
