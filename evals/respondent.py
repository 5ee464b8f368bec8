"""Who is asked: a model directory, or in tests anything that responds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from evals.task import Request, Response

Beat = Callable[[int], None]
"""Called while the work goes on, with the number of responses that have just become known. It may raise, to stop it."""


class Respondent(Protocol):
    """Answers requests.

    name: in the report.
    fingerprint: of whatever decides the responses.
    has_template: whether messages can be asked; otherwise only texts.
    """

    name: str
    fingerprint: str
    has_template: bool

    def respond(self, requests: Sequence[Request], beat: Beat | None = None) -> list[Response]:
        """The responses in the order of the requests, which may be of any kinds."""
        ...
