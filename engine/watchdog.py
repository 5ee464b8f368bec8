"""Ends a run that no longer moves, with the stacks of all ranks; names a rank that holds the others up."""

from __future__ import annotations

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import torch
from torch import nn

from engine.launch import EXIT_UNEXPECTED


class Watchdog:
    """A thread on every rank that ends the process when `beat` was not called for `seconds`.

    A hanging collective stops every rank at about the same time, so every rank prints its own stacks.
    Use as a context manager around the loop.
    """

    def __init__(self, seconds: float, name: str) -> None:
        self.seconds = seconds
        self.name = name
        self._last = time.monotonic()
        self._doing = "starting"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """The run moves; `doing` says what it does next."""
        self._doing = doing
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.seconds / 4)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                message = (
                    f"{self.name} has not moved for {silent:.0f} s while {self._doing}. Its stacks follow; the rank "
                    "whose stack differs is the one the others wait for. Raise --parallel.timeout_minutes if this "
                    "step is meant to take so long."
                )
                print(message, file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(EXIT_UNEXPECTED)


class BusyClock:
    """How long this rank computes without waiting for others: the forward time of its blocks, plus its data wait.

    Collectives make every rank's step take as long as the slowest one's. Inside a block's forward, after its
    weights have been gathered, nothing is shared, so that time is the rank's own.

    Args:
        blocks: modules to time, after sharding, so that our hooks lie inside FSDP's.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pairs: list[tuple] = []
        self.is_running = False
        for block in blocks:
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, prepend=True)

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, *_: object) -> None:
        if self.is_running and torch.is_grad_enabled():
            self._pairs.append((self._now(),))

    def _leave(self, *_: object) -> None:
        if self.is_running and torch.is_grad_enabled() and self._pairs and len(self._pairs[-1]) == 1:
            self._pairs[-1] += (self._now(),)

    def take(self) -> float:
        """Seconds since the last call; waits for the device only if that step is still running."""
        pairs, self._pairs = [pair for pair in self._pairs if len(pair) == 2], []
        if not self._on_gpu:
            return sum(end - begin for begin, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000


class Stragglers:
    """Names a rank that was busy far longer than the others in several looks in a row."""

    FACTOR = 1.5
    LOOKS = 3

    def __init__(self, world: int) -> None:
        self._slow_looks = [0] * world

    def look(self, busy_seconds: Sequence[float]) -> str | None:
        """A sentence when a rank has just become known as slow, else None."""
        # The lower median, so that of two ranks the faster one is the measure.
        usual = statistics.median_low(busy_seconds)
        for rank, busy in enumerate(busy_seconds):
            is_slow = 0 < self.FACTOR * usual < busy
            self._slow_looks[rank] = self._slow_looks[rank] + 1 if is_slow else 0
            if self._slow_looks[rank] == self.LOOKS:
                return (
                    f"rank {rank} is slow: busy {busy:.2f} s a step where the others need "
                    f"{usual:.2f} s. Check its GPU's clock and temperature, and its disk."
                )
        return None
