"""A task of every kind of request, of which everything is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from engine.chatting import SamplingConfig
from evals.task import Answer, Answered, Choose, Chosen, Item, Metric, Prompt, Read, Request, Response, Result, Scored
from model.chat import Message
from tests.small_base import ADVICE, FINDINGS, SUBJECTS


@dataclass(frozen=True)
class SmallTask:
    """`count` questions to choose an option of, as many to answer (drawn at temperature 1), and a text to read."""

    count: int = 6
    prompting: str = "chat"
    seed: int = 0
    max_new_tokens: int = 12
    name: str = "small"
    kind: str = "choice"
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]:
        return {"count": self.count, "prompting": self.prompting, "seed": self.seed, **self.notes}

    def requests(self) -> Sequence[Request]:
        sampling = SamplingConfig(temperature=1.0, top_p=1.0, max_new_tokens=self.max_new_tokens)
        asked: list[Request] = []
        for number in range(self.count):
            finding, subject = FINDINGS[number % len(FINDINGS)], SUBJECTS[number % len(SUBJECTS)]
            options = tuple(ADVICE[: 2 + number % 3])
            asked.append(Choose(f"choose/{number}", self._prompt(f"{number}，{subject}患者{finding}，应当"), options))
            asked.append(Answer(f"answer/{number}", self._prompt(f"{finding}{number}怎么办？"), sampling, self.seed))
        asked.append(Read("read", "，".join(f"患者{finding}" for finding in FINDINGS) * 9))
        return asked

    def result(self, responses: Mapping[str, Response]) -> Result:
        """Accuracy where the first option is right."""
        items = []
        for request in self.requests():
            response = responses[request.id]
            if isinstance(response, Chosen):
                right = response.logprobs.index(max(response.logprobs)) == 0
                items.append(Item(request.id, {"accuracy": (float(right), 1.0)}, "…", str(right), "", texts=("…",)))
            else:
                assert isinstance(response, (Answered, Scored))
        value = sum(item.parts["accuracy"][0] for item in items) / len(items)
        return Result((Metric("accuracy", value, n=len(items)),), tuple(items))

    def _prompt(self, text: str) -> Prompt:
        return (Message("user", text),) if self.prompting == "chat" else text
