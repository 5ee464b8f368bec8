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

from engine.benchmark import Lap, free, now, race
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
    """What a contender did. peak: bytes on a GPU, without what was there before. failure: why there are no laps."""

    settings: str = ""
    laps: list[Lap] = field(default_factory=list)
    peak: int | None = None
    padding: float = 0.0
    parts: Parts | None = None
    failure: str = ""


class _Runner:
    """A contender with what is known of it: its laps read the tokens of a step from the steps that all take."""

    def __init__(
        self, build: Callable[[], Contender], steps: list[Step], sizes: Sizes, device: torch.device, vocabulary: int
    ) -> None:
        self._steps, self._sizes, self._device, self._vocabulary = steps, sizes, device, vocabulary
        self._taken, self._waited = 0, 0.0
        self._before = _allocated(device)
        self._contender = build()
        try:
            self._take(sizes.warm)
        except BaseException:
            self.close()
            raise
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

    def step(self) -> Lap:
        begin, waited = now(self._device), self._waited
        tokens = self._take(self._sizes.steps)
        return Lap(tokens, time.perf_counter() - begin, self._waited - waited)

    def finish(self, outcome: Outcome) -> None:
        """Read off what is left, look where the time goes, and free everything, also where looking fails."""
        contender = self._contender
        outcome.settings, outcome.padding = contender.settings, contender.padding_share
        if self._device.type == "cuda":
            outcome.peak = torch.cuda.max_memory_allocated(self._device) - self._before
        try:
            if self._sizes.traced and outcome.parts is None:
                events = trace(contender.step, self._sizes.traced, self._device)
                outcome.parts = parts(events, self._sizes.traced, self._vocabulary)
        finally:
            self.close()

    def close(self) -> None:
        self._contender.close()
        free()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(
    builders: dict[str, Callable[[], Contender]],
    steps: list[Step],
    sizes: Sizes,
    device: torch.device,
    vocabulary: int,
    has_time: Callable[[], bool],
) -> dict[str, Outcome]:
    """Run every contender, as this file says for the device.

    Args:
        builders: by name, OURS first; why a peer could not be built or failed is said in its outcome.
        vocabulary: rows of the head.
        has_time: asked before a contender begins; those that are not begun have no outcome.
    Raises:
        torch.cuda.OutOfMemoryError: ours did not fit, and nobody else was tried.
    """

    def runner(name: str) -> _Runner:
        return _Runner(builders[name], steps, sizes, device, vocabulary)

    outcomes: dict[str, Outcome] = {}
    if device.type == "cuda":
        for name in [*builders, OURS] if len(builders) > 1 else builders:
            if not outcomes or has_time():
                outcome = outcomes.setdefault(name, Outcome())
                with _told(name, outcome):
                    _alone(runner(name), outcome, sizes)
        return outcomes
    runners: dict[str, _Runner] = {}
    for name in builders:
        outcomes[name] = Outcome()
        with _told(name, outcomes[name]):
            runners[name] = runner(name)
    for name, laps in race(runners, sizes.laps).items():
        outcomes[name].laps = laps
        runners[name].finish(outcomes[name])
    return outcomes


def _alone(runner: _Runner, outcome: Outcome, sizes: Sizes) -> None:
    try:
        outcome.laps += [runner.step() for _ in range(sizes.laps)]
    except BaseException:
        runner.close()
        raise
    runner.finish(outcome)


@contextmanager
def _told(name: str, outcome: Outcome) -> Iterator[None]:
    """A failure of anyone else is an outcome; one of ours is raised, but for memory once there are laps."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        if name == OURS and not outcome.laps:
            raise
        outcome.failure = "" if outcome.laps else "does not fit"
    except Exception as error:
        if name == OURS:
            raise
        outcome.failure = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    free()
