"""A task asked of a model, by one process or many.

    known = store.read()                                    what an earlier call has left
    for group in my share of the requests:                  every rank holds a whole model
        store.append(respondent.respond(group))
    responses = everybody's
    result = task.result(responses)                         on every rank the same

A group is computed as a whole: one that was interrupted is asked again from its first request, so that every row
shares its matrix products with the rows that it would have had beside it, and the files are the same to the byte as
those of a run that nothing interrupted. With another number of ranks the groups are others: the same but for rounding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.agreement import ControlGroup
from engine.launch import StoppedError, is_main_process
from engine.live_line import LiveLine, duration
from engine.signals import StopSignals
from evals.respondent import Respondent
from evals.store import Store
from evals.task import Answer, Answered, Choose, Chosen, Request, Response, Result, Task

# Requests of a group. Answers: eight times as many as are written at once, so that the end of a group, where few rows
# are left, weighs little. Scores: so many that what their prompts have in common is nearly free.
_ANSWERS, _SCORES = 512, 256


@dataclass(frozen=True)
class Evaluation:
    """All that a report says of one model.

    model: its name in tables.
    directory, fingerprint: where it lies, and what it was.
    results, settings, kinds: by the label of a task: what came of it, what decided the numbers (`Task.settings` and
        what the respondent adds), and `Task.kind`.
    contamination: by label, what `evals.contamination.find_overlap` found; empty where nobody looked.
    date: ISO 8601 in UTC.
    versions: of this program and the libraries that numbers depend on, by name.
    command: that made it.
    """

    model: str
    directory: str
    fingerprint: str
    results: Mapping[str, Result]
    settings: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, str]
    contamination: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def evaluate(task: Task, respondent: Respondent, store: Store, ranks: ControlGroup | None = None) -> Result:
    """What a model's responses are worth. A collective: all ranks call it. Arguments and errors as `collect`."""
    return conclude(task, collect(task, respondent, store, ranks), store)


def collect(
    task: Task,
    respondent: Respondent,
    store: Store,
    ranks: ControlGroup | None = None,
    signals: StopSignals | None = None,
) -> dict[str, Response]:
    """The responses to all requests of a task, by id: those that are kept, and the rest asked now. A collective.

    Args:
        respondent: each rank's own, of the same model.
        store: each rank's own, of the same folder.
        ranks: who shares the work; by default all that there are.
        signals: that ask to stop.
    Raises:
        InputError: the folder holds responses to other requests, or of another model; a request cannot be asked.
        StoppedError: a signal came. What was answered in whole groups is kept.
    """
    ranks, requests = ranks or ControlGroup(), task.requests()
    order = [request.id for request in requests]
    assert len(set(order)) == len(order), "two requests have one id"
    settings = all_settings(task, respondent, requests)

    def begin() -> dict[str, Response]:
        store.begin(settings)
        return store.read()

    known = ranks.first(f"write {store.folder}", begin)
    groups = [group for group in share(requests, ranks.rank, ranks.world) if any(one.id not in known for one in group)]
    meter = _Meter(store.folder.name, sum(map(len, groups)), ranks.world)
    own: dict[str, Response] = {}

    def beat(ended: int) -> None:
        meter.count(ended)
        if signals is not None and signals.wants_stop:
            raise _Stopped

    try:
        for group in groups:
            if signals is not None and signals.wants_stop:
                raise _Stopped
            responses = dict(zip((one.id for one in group), respondent.respond(group, beat), strict=True))
            new = {name: response for name, response in responses.items() if name not in known}
            store.append(new.items())
            own |= new
            meter.keep(len(group))
        is_stopped = False
    except _Stopped:
        is_stopped = True
    parts = ranks.gather((own, is_stopped))
    if any(is_stopped for _, is_stopped in parts):
        code = 143 if signals is None else signals.exit_code
        raise StoppedError("Stopped. What was answered is kept; the same command goes on.", code)
    for part, _ in parts:
        known |= part
    ranks.first(f"write {store.folder}", lambda: store.finish(order, known))
    return {name: known[name] for name in order}


def conclude(task: Task, responses: Mapping[str, Response], store: Store | None = None) -> Result:
    """What responses are worth, with the counts of what was shortened; rank 0 keeps the predictions."""
    result = task.result(responses)
    prompts = [response for response in responses.values() if isinstance(response, (Chosen, Answered))]
    counts = {
        "prompts_without_oldest_turns": sum(response.dropped > 0 for response in prompts),
        "prompts_cut": sum(response.cut > 0 for response in prompts),
        "answers_without_end": sum(isinstance(one, Answered) and one.end_reason == "length" for one in prompts),
    }
    found = {name: count for name, count in counts.items() if count}
    result = dataclasses.replace(result, counts={**result.counts, **found})
    if store is not None and is_main_process():
        store.write_predictions(result)
    return result


def all_settings(task: Task, respondent: Respondent, requests: Sequence[Request]) -> dict[str, Any]:
    """Everything that decides the responses to a task and what they are worth."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(repr(request).encode(errors="backslashreplace"))
    return {
        "task": task.name,
        **task.settings,
        "requests": len(requests),
        "requests_digest": digest.hexdigest()[:32],
        "model": respondent.fingerprint,
        **respondent.settings,
    }


def share(requests: Sequence[Request], rank: int, world: int) -> list[list[Request]]:
    """The groups of requests that one of `world` ranks computes, in its order.

    Answers are dealt out in turn. What is scored lies together by the prompts' beginnings, which are computed once for
    all that have them, in shares of about equally many characters.
    """
    answers = [request for request in requests if isinstance(request, Answer)][rank::world]
    scored = sorted((request for request in requests if not isinstance(request, Answer)), key=_shown)
    reach = list(itertools.accumulate((len(_shown(request)) + 1 for request in scored), initial=0))
    own = [one for one, begin in zip(scored, reach, strict=False) if begin * world // reach[-1] == rank]
    parts: tuple[tuple[Sequence[Request], int], ...] = ((own, _SCORES), (answers, _ANSWERS))
    return [list(part[start : start + size]) for part, size in parts for start in range(0, len(part), size)]


def _shown(request: Request) -> str:
    if not isinstance(request, (Choose, Answer)):
        return request.text
    return request.prompt if isinstance(request.prompt, str) else "\n".join(one.content for one in request.prompt)


class _Stopped(Exception):
    """A signal came."""


class _Meter:
    """How far rank 0 is."""

    def __init__(self, label: str, total: int, world: int) -> None:
        self._line, self._began = LiveLine(), time.monotonic()
        self._label, self._total, self._whose = label, total, "" if world == 1 else f" on each of {world} ranks"
        self._kept = self._ended = 0

    def count(self, ended: int) -> None:
        self._ended += ended
        if ended and self._kept + self._ended < self._total:
            self._show()

    def keep(self, count: int) -> None:
        self._kept, self._ended = self._kept + count, 0
        self._show(is_last=self._kept == self._total)

    def _show(self, is_last: bool = False) -> None:
        if is_main_process():
            took = duration(time.monotonic() - self._began)
            text = f"{self._label}: {self._kept + self._ended:,} of {self._total:,} requests{self._whose}, {took}"
            self._line.show(text, is_last)
