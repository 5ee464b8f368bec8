"""Who is asked: a model directory, or in tests anything that responds."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from engine.chatting import room
from engine.model_directory import ModelDirectory, resolve_device, resolve_dtype
from evals.prompt_encoding import PromptEncoder
from evals.task import Answer, Answered, Choose, Chosen, Read, Request, Response, Scored
from model.chat import ConversationError
from model.errors import InputError
from model.generate import EndReason, Generator
from model.generate import Request as Generation
from model.scoring import score

Beat = Callable[[int], None]
"""Called for every token of an answer, with the number of answers that it ended. It may raise, to stop the work."""


class Respondent(Protocol):
    """Answers requests.

    name: in the report.
    fingerprint: of whatever decides the responses.
    has_template: whether messages can be asked; otherwise only texts.
    settings: what else decides the responses, by name.
    """

    name: str
    fingerprint: str
    has_template: bool
    settings: Mapping[str, str | int]

    def respond(self, requests: Sequence[Request], beat: Beat | None = None) -> list[Response]:
        """The responses in the order of the requests, which may be of any kinds.

        Raises:
            InputError: a request cannot be asked.
        """
        ...


class ModelRespondent:
    """A model directory, whose weights are read when they are first needed.

    Args:
        name: in the report; by default the directory's.
        device, dtype, context, max_rows: as in `ModelDirectory.generator`.
    Raises:
        InputError: there is no such device, or the context is longer than the model's.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        name: str = "",
        *,
        device: str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        max_rows: int = 64,
    ) -> None:
        self.directory, self.name = directory, name or directory.path.resolve().name
        self.fingerprint, self.has_template = directory.fingerprint, directory.template is not None
        self._how: Any = {"device": device, "dtype": dtype, "context": context, "max_rows": max_rows}
        self.context = directory.config.rope_length if context is None else context
        directory.config.with_context(self.context)
        self.encoder = PromptEncoder(directory, self.context)
        template = directory.template
        self.settings: Mapping[str, str | int] = {
            "chat_template": "none" if template is None else f"{template.name} {template.fingerprint}",
            "dtype": str(resolve_dtype(dtype, resolve_device(device))).removeprefix("torch."),
            "context": self.context,
        }

    @cached_property
    def generator(self) -> Generator:
        """The weights. Raises InputError: memory does not do, or they are damaged."""
        return self.directory.generator(**self._how)

    def release(self) -> None:
        """Give back the memory of the weights, until they are needed again."""
        if "generator" in vars(self):
            self.generator.release()
            del self.generator

    def respond(self, requests: Sequence[Request], beat: Beat | None = None) -> list[Response]:
        """See `Respondent`. All options are scored together, so that what prompts have in common is computed once;
        answers are written by continuous batching."""
        chosen = iter(self._choose([one for one in requests if isinstance(one, Choose)]))
        scored = iter(self._read([one for one in requests if isinstance(one, Read)]))
        answered = iter(self._answer([one for one in requests if isinstance(one, Answer)], beat))
        responses: dict[type, Iterator[Response]] = {Choose: chosen, Read: scored, Answer: answered}
        return [next(responses[type(one)]) for one in requests]

    def _choose(self, requests: Sequence[Choose]) -> list[Chosen]:
        pairs = []
        for request in requests:
            with _asking(request):
                pairs.append(self.encoder.pair(request.prompt, request.options))
        prefixes, options = [prompt.ids for prompt, _ in pairs], [own for _, own in pairs]
        scores = score(self.generator.model, prefixes, options, with_greedy=True)
        self._require_finite(
            (request.id, one.logprobs) for request, own in zip(requests, scores, strict=True) for one in own
        )
        return [
            Chosen(
                logprobs=tuple(sum(one.logprobs) for one in own),
                tokens=tuple(len(one.logprobs) for one in own),
                is_greedy=tuple(bool(one.is_greedy) for one in own),
                dropped=prompt.dropped,
                cut=prompt.cut,
            )
            for (prompt, _), own in zip(pairs, scores, strict=True)
        ]

    def _read(self, requests: Sequence[Read]) -> list[Scored]:
        windows = [(place, *pair) for place, one in enumerate(requests) for pair in self.encoder.windows(one.text)]
        scores = score(self.generator.model, [before for _, before, _ in windows], [[ids] for _, _, ids in windows])
        self._require_finite(
            (requests[place].id, own.logprobs) for (place, *_), [own] in zip(windows, scores, strict=True)
        )
        sums, tokens = [0.0] * len(requests), [0] * len(requests)
        for (place, _, ids), [own] in zip(windows, scores, strict=True):
            sums[place] += sum(own.logprobs)
            tokens[place] += len(ids)
        return [Scored(*pair) for pair in zip(sums, tokens, strict=True)]

    def _require_finite(self, scored: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Weights that are damaged, or that overflow, would otherwise answer: the first option, always."""
        for id, logprobs in scored:
            if not all(map(math.isfinite, logprobs)):
                raise InputError(
                    f"{self.directory.path}: its log-probabilities at {id} are not finite. Its weights are damaged, or "
                    f"too large for {self.settings['dtype']}: try --dtype float32."
                )

    def _answer(self, requests: Sequence[Answer], beat: Beat | None) -> list[Answered]:
        prompts, generations = [], []
        for request in requests:
            following = room(self.context, request.sampling.max_new_tokens)
            with _asking(request):
                prompts.append(self.encoder.prompt(request.prompt, following, least=1))
            options = request.sampling.options(self.directory.stop_ids)
            generations.append(Generation(prompts[-1].ids, options, seed=_seed(request)))
        pieces: list[list[str]] = [[] for _ in requests]  # a token each
        ends: list[EndReason] = ["length"] * len(requests)
        for event in self.generator.stream(generations):
            pieces[event.request].append(event.text)
            ends[event.request] = event.end_reason or "length"
            if beat is not None:
                beat(event.end_reason is not None)
        return [
            Answered("".join(own), end, len(own), prompt.dropped, prompt.cut)
            for own, end, prompt in zip(pieces, ends, prompts, strict=True)
        ]


@contextlib.contextmanager
def _asking(request: Request) -> Iterator[None]:
    try:
        yield
    except ConversationError as error:
        raise InputError(f"{request.id} cannot be asked: {error}. Mend the task's file.") from None


def _seed(request: Answer) -> int:
    """Of a request's draws: no two requests of a task share them."""
    digest = hashlib.blake2b(f"{request.seed} {request.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
