"""Respondents of which theory says what they score: always the same, always right, by chance."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from evals.respondent import Beat
from evals.task import Answer, Answered, Choose, Chosen, Prompt, Read, Request, Response, Result, Scored, Task


class Stub:
    """Responds by functions.

    Args:
        choose: the likelihood of each option of a request, of any scale above 0.
        say: what is answered.
    Attributes:
        seen: every request, in the order in which it came.
    """

    def __init__(
        self,
        choose: Callable[[Choose], Sequence[float]],
        say: Callable[[Answer], str],
        has_template: bool = True,
        name: str = "stub",
    ) -> None:
        self._choose, self._say = choose, say
        self.name, self.has_template, self.fingerprint = name, has_template, f"{name} of the tests"
        self.settings: dict[str, str | int] = {}
        self.seen: list[Request] = []

    def respond(self, requests: Sequence[Request], beat: Beat | None = None) -> list[Response]:
        self.seen += requests
        return [self._respond(request) for request in requests]

    def _respond(self, request: Request) -> Response:
        if isinstance(request, Choose):
            likelihoods = self._choose(request)
            assert len(likelihoods) == len(request.options)
            total, best = sum(likelihoods), max(likelihoods)
            logprobs = tuple(math.log(one / total) for one in likelihoods)
            return Chosen(logprobs, tuple(map(len, request.options)), tuple(one == best for one in likelihoods))
        if isinstance(request, Answer):
            text = self._say(request)
            return Answered(text, "stop", len(text) + 1)
        assert isinstance(request, Read)
        return Scored(-math.log(2) * len(request.text), len(request.text))  # 1 bit a character


def always(option: int = 0, text: str = "A") -> Stub:
    """Takes the same option, and says the same text, whatever is asked."""
    return Stub(lambda asked: _prefer(asked, option), lambda asked: text, name="always")


def knowing(key: Mapping[str, int | str]) -> Stub:
    """Takes the right option and says the right text.

    Args:
        key: by the id of a request: the number of the right option or its text, or the answer's text.
    """

    def choose(asked: Choose) -> list[float]:
        right = key[asked.id]
        return _prefer(asked, asked.options.index(right) if isinstance(right, str) else right)

    return Stub(choose, lambda asked: str(key[asked.id]), name="knowing")


def guessing(seed: int = 0, sayings: Sequence[str] = ("A", "B", "C", "D")) -> Stub:
    """Takes any option, and says any of `sayings`, each with equal probability; the same for the same request."""

    def choose(asked: Choose) -> list[float]:
        return _prefer(asked, random.Random(f"{seed} {asked.id}").randrange(len(asked.options)))

    def say(asked: Answer) -> str:
        return random.Random(f"{seed} {asked.id}").choice(list(sayings))

    return Stub(choose, say, name="guessing")


def ask(task: Task, stub: Stub) -> Result:
    """What the stub's responses to all requests are worth."""
    requests = task.requests()
    assert [*map(repr, requests)] == [*map(repr, task.requests())], "requests() is not the same at every call"
    assert len({request.id for request in requests}) == len(requests), "ids are not unique"
    responses = dict(zip((request.id for request in requests), stub.respond(requests), strict=True))
    return task.result(responses)


def text_of(prompt: Prompt) -> str:
    """All that a prompt says."""
    return prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)


def _prefer(asked: Choose, option: int) -> list[float]:
    return [10.0 if place == option else 1.0 for place in range(len(asked.options))]
