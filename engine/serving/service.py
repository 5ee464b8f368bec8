"""The thread that owns the generator: jobs of all clients go in, their tokens come out, all in one batch.

    submit ──► inbox ──► generator.add ──► generator.step ──► deliver(Event)… ──► deliver(Scored)… ──► deliver(None)
                             cancel ──► generator.cancel: the row's seat is free in the next step

Nobody else touches the generator. How many answers are accepted and not over is bounded: a job that would exceed it is
refused at once, and whoever sent it is told to come again.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from engine.serving.metrics import Metrics
from model.errors import InputError
from model.generate import Event, Generator, Request
from model.top_logprobs import TokenLogprob, top_logprobs


class QueueFull(Exception):
    """As many answers are accepted as may be; a later try may find room."""


class ServiceClosed(Exception):
    """Nothing is accepted any more: the server shuts down, or has failed."""


class Scored(NamedTuple):
    """Log-probabilities of a prompt and its answer; the first token has none."""

    request: int
    sample: int
    logprobs: list[TokenLogprob]


Deliver = Callable[[Event | Scored | Exception | None], None]


class Job:
    """Requests of one client. Their events are numbered from 0 in the order of the requests.

    top: with so many of the likeliest tokens each prompt and answer is scored when the answer is over; None: not at
        all.
    writes: False: only prompts are scored.
    deliver: called in the service's thread, with None once all is said, or with what went wrong.
    """

    def __init__(self, requests: Sequence[Request], deliver: Deliver, top: int | None = None, writes: bool = True):
        assert writes or top is not None, "a job that has nothing to do"
        self.requests, self.deliver, self.top, self.writes = tuple(requests), deliver, top, writes
        self.answers = sum(request.samples for request in requests)
        self._began, self._has_begun = time.monotonic(), False
        self._open = {(number, sample) for number, r in enumerate(requests) for sample in range(r.samples)}
        self._numbers: list[int] = []  # the generator's
        self._ids: dict[tuple[int, int], list[int]] = {}


class GenerationService:
    """Continuous batching across clients.

    Args:
        generator: with weights and tokenizer; the service's own from now on.
        max_queue: answers that may wait beside those that `max_rows` of the generator lets run.
        on_failure: called in the thread if it cannot go on; `failure` says why.
    """

    def __init__(
        self,
        generator: Generator,
        max_rows: int,
        max_queue: int,
        metrics: Metrics | None = None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.capacity, self.metrics = max_rows + max_queue, metrics or Metrics()
        self.context = generator.context
        self.failure: Exception | None = None
        self._generator, self._on_failure = generator, on_failure
        self._changed = threading.Condition()
        self._inbox: list[Job] = []
        self._cancelled: list[Job] = []
        self._accepted = 0  # answers that are not over
        self._is_closing = False
        # Of the thread alone:
        self._active: set[Job] = set()
        self._places: dict[int, tuple[Job, int]] = {}  # by the generator's number of a request
        self._to_score: deque[tuple[Job, int, int]] = deque()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """(answers that are being written, accepted ones that are not yet)"""
        running = self._generator.running
        return running, max(0, self._accepted - running)

    @property
    def is_open(self) -> bool:
        return not self._is_closing

    def submit(self, job: Job) -> None:
        """Have a job done; from any thread.

        Raises:
            InputError: a request that cannot be answered, or a job that never fits the queue.
            QueueFull, ServiceClosed: not now, or never again.
        """
        for request in job.requests:
            self._generator.check(request)
        if job.answers > self.capacity:
            raise InputError(f"{job.answers} answers are asked for at once. Ask for at most {self.capacity}.")
        with self._changed:
            if self._is_closing:
                raise ServiceClosed
            if self._accepted + job.answers > self.capacity:
                raise QueueFull
            self._accepted += job.answers
            self._inbox.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give up what is left of a job, if anything is; from any thread. Nothing more is delivered, soon."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Accept nothing more, finish what was accepted, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while self._take():
                if self._to_score:
                    self._score(*self._to_score.popleft())
                if not self._generator.is_idle:
                    for event in self._generator.step():
                        self._pass_on(event)
        except Exception as error:  # the edge of the thread: clients must not wait for ever
            self._fail(error)

    def _take(self) -> bool:
        """Start and cancel what was asked for since the last step, waiting while there is nothing to do; whether to
        go on."""
        with self._changed:
            while not (self._inbox or self._cancelled or self._has_work):
                if self._is_closing:
                    return False
                self._changed.wait()
            jobs, cancelled = self._inbox, self._cancelled
            self._inbox, self._cancelled = [], []
        self._active |= set(jobs)
        for job in jobs:
            self._start(job)
        for job in cancelled:
            self._drop(job)
        return True

    @property
    def _has_work(self) -> bool:
        return bool(self._to_score) or not self._generator.is_idle

    def _start(self, job: Job) -> None:
        if not job.writes:
            self._to_score += [(job, *answer) for answer in sorted(job._open)]
            return
        try:
            for number, request in enumerate(job.requests):
                job._numbers.append(self._generator.add(request))
                self._places[job._numbers[-1]] = job, number
        except InputError as error:  # of the tokenizer
            self._drop(job)
            job.deliver(error)

    def _pass_on(self, event: Event) -> None:
        job, number = self._places[event.request]
        if not job._has_begun:
            job._has_begun = True
            self.metrics.first_token(time.monotonic() - job._began)
        job._ids.setdefault((number, event.sample), []).append(event.id)
        self.metrics.count("generated_tokens")
        job.deliver(replace(event, request=number))
        if event.end_reason is None:
            return
        if job.top is None:
            self._finish(job, number, event.sample)
        else:
            self._to_score.append((job, number, event.sample))

    def _score(self, job: Job, number: int, sample: int) -> None:
        assert job.top is not None
        ids = [*job.requests[number].prompt, *job._ids.get((number, sample), ())]
        job.deliver(Scored(number, sample, top_logprobs(self._generator.model, ids, 1, job.top)))
        self._finish(job, number, sample)

    def _finish(self, job: Job, number: int, sample: int) -> None:
        job._open.remove((number, sample))
        self._free(1)
        self.metrics.count("answers")
        if not job._open:
            self._forget(job)
            job.deliver(None)

    def _drop(self, job: Job) -> None:
        self._to_score = deque(waiting for waiting in self._to_score if waiting[0] is not job)
        for number in job._numbers:
            self._generator.cancel(number)
        self._forget(job)
        self._free(len(job._open))
        self.metrics.count("answers_cancelled", len(job._open))
        job._open.clear()

    def _forget(self, job: Job) -> None:
        self._active.discard(job)
        for number in job._numbers:
            self._places.pop(number, None)

    def _free(self, answers: int) -> None:
        with self._changed:
            self._accepted -= answers

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._is_closing, self.failure = True, error
        for job in {*self._inbox, *self._active}:
            job.deliver(error)
        self._on_failure()
