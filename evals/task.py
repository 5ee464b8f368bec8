"""What an evaluation is made of: a task asks, a model responds, the task says what the responses are worth.

    requests = task.requests()                      what is asked, data alone
    responses = respondent.respond(requests)        evals.respondent: a model; in tests anything else
    result = task.result(responses)                 numbers, and what each of them is made of

Requests and responses are plain values that are kept on disk, so every number can be computed again without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from engine.chatting import SamplingConfig
from model.chat import Message
from model.generate import EndReason

Prompt = str | tuple[Message, ...]
"""What a model is shown. A text stands at the beginning of a document and is gone on with; messages are written down
by the chat template, and gone on with behind the header of the assistant's next turn."""


@dataclass(frozen=True)
class Choose:
    """How likely is each of these continuations of the prompt?

    options: not empty; "" is none.
    """

    id: str
    prompt: Prompt
    options: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What does the model say?

    sampling: how the answer is drawn; its `stop` are texts that end it besides the model's own end tokens.
    seed: of the draw; the same request always gets the same answer.
    """

    id: str
    prompt: Prompt
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0, top_p=1.0))
    seed: int = 0


@dataclass(frozen=True)
class Read:
    """How likely is this text? Every token counts, given those before it in the text, as far back as the context."""

    id: str
    text: str


Request = Choose | Answer | Read


class Chosen(NamedTuple):
    """Response to Choose. Of each option: the sum of its tokens' log-probabilities in nats, how many tokens it has,
    and whether each of them is the likeliest one.

    dropped, cut: as of an answer.
    """

    logprobs: tuple[float, ...]
    tokens: tuple[int, ...]
    is_greedy: tuple[bool, ...]
    dropped: int = 0
    cut: int = 0


class Answered(NamedTuple):
    """Response to Answer.

    tokens: with the one that ended it.
    dropped: oldest turns of messages that were left out because the context did not hold them.
    cut: oldest tokens of the prompt that were left out for the same reason, where it is a text or one long turn.
    """

    text: str
    end_reason: EndReason
    tokens: int
    dropped: int = 0
    cut: int = 0


class Scored(NamedTuple):
    """Response to Read. logprob: in nats, of all tokens."""

    logprob: float
    tokens: int


Response = Chosen | Answered | Scored


@dataclass(frozen=True)
class Item:
    """One question, text or questionnaire item, and what became of it.

    id: the same for every model, so that models can be compared item by item.
    parts: name of a metric -> (numerator, denominator). The metric over any set of items is the sum of the numerators
        over the sum of the denominators: accuracy is (1 or 0, 1), micro-F1 (2 tp, 2 tp + fp + fn), a mean (x, 1).
        Intervals and comparisons resample items and sum again.
    shown: the prompt as the model saw it, shortened nowhere.
    answer: what the model said, or the option that it holds the likeliest.
    gold: what is right; "" where nothing is.
    group: subject, department, subscale; "" for none.
    texts: what must not have been trained on, for the contamination check, apart where letters or labels may stand
        between them: a question and each of its options; a text.
    """

    id: str
    parts: Mapping[str, tuple[float, float]]
    shown: str
    answer: str
    gold: str
    group: str = ""
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A number of the report.

    name: the field's name, such as accuracy, micro_f1, bleu_4.
    value: a fraction where `unit` is "%", otherwise in that unit; nan if there was nothing to measure.
    low, high: of its 95 % interval; None where there is none.
    n: of what it was computed on.
    better: which way is better; None where neither is, as of a length ratio.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: Literal["%", "nats", "score", "points", "tokens", ""] = "%"
    better: Literal["higher", "lower"] | None = "higher"


@dataclass(frozen=True)
class Result:
    """What came of a task.

    metrics: the first is the one that a table shows if it shows one.
    groups: by subject, type of entity, subscale: the metrics there.
    baselines: what is known without a model, such as the accuracy of always answering A: (name, metric's name, value).
    counts: what went wrong and what was left out, by name: unparsed, unreadable, dropped_exemplars, ...
    notes: sentences that a reader of the number must know.
    """

    metrics: tuple[Metric, ...]
    items: tuple[Item, ...]
    groups: Mapping[str, tuple[Metric, ...]] = field(default_factory=dict)
    baselines: tuple[tuple[str, str, float], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Task(Protocol):
    """One row of the report.

    name: as on the command line, such as cmmlu; unique in an evaluation.
    kind: which section of the report it belongs to.
    settings: everything that decides what is asked and how it is counted: protocol, shots, template of the prompt,
        fingerprint of the files, signature of the metrics. Kept beside the responses; a resumed run must have the same.
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Literal["choice", "entities", "generation", "attitudes", "reward", "perplexity"]: ...

    @property
    def settings(self) -> Mapping[str, str | int | float | bool]: ...

    def requests(self) -> Sequence[Request]:
        """What is asked, ids unique, the same at every call."""
        ...

    def result(self, responses: Mapping[str, Response]) -> Result:
        """What the responses to all requests, by id, are worth. Asked on rank 0, of kind `reward` on every rank."""
        ...
