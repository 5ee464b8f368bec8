"""From tokens to OpenAI's answers: whole ones, and the pieces of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.serving.service import Scored
from model.generate import Event, Request
from model.streaming import TextStream
from model.tokenizer import Tokenizer
from model.top_logprobs import TokenLogprob

DONE = b"data: [DONE]\n\n"


@dataclass
class Answer:
    """One answer, as far as it has come."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    end_reason: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Answers:
    """All answers to one client's requests, in the order in which they are listed.

    kind: "chat.completion" or "text_completion".
    """

    def __init__(self, kind: str, model: str, requests: Sequence[Request]) -> None:
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._kind, self._is_chat, self.requests = kind, kind == "chat.completion", requests
        self._samples = requests[0].samples
        self.answers = [Answer() for request in requests for _ in range(request.samples)]

    def index(self, event: Event | Scored) -> int:
        """Which answer an event belongs to."""
        return event.request * self._samples + event.sample

    def add(self, event: Event | Scored) -> None:
        answer = self.answers[self.index(event)]
        if isinstance(event, Scored):
            answer.logprobs = event.logprobs
            return
        answer.text += event.text
        answer.ids.append(event.id)
        answer.end_reason = event.end_reason

    @property
    def usage(self) -> dict[str, int]:
        """A prompt counts once, however many answers it has."""
        prompt = sum(len(request.prompt) for request in self.requests)
        written = sum(len(answer.ids) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def chat(self) -> dict[str, Any]:
        """A whole chat.completion."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                "finish_reason": answer.end_reason,
            }
            for index, answer in enumerate(self.answers)
        ]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage}

    def completion(self, tokenizer: Tokenizer, echoed: Sequence[str] | None, with_logprobs: bool) -> dict[str, Any]:
        """A whole text_completion.

        Args:
            echoed: the prompts' texts, to stand before the answers; None for answers alone.
            with_logprobs: of what is shown.
        """
        choices = []
        for index, answer in enumerate(self.answers):
            request = index // self._samples
            before = "" if echoed is None else echoed[request]
            logprobs = None
            if with_logprobs:
                prompt = self.requests[request].prompt
                logprobs = list_logprobs(tokenizer, prompt, before, answer, is_echoed=echoed is not None)
            reason = answer.end_reason or "length"  # of a prompt that is only scored
            choices.append(
                {"index": index, "text": before + answer.text, "logprobs": logprobs, "finish_reason": reason}
            )
        return {**self._head, "object": self._kind, "choices": choices, "usage": self.usage}

    def begin_stream(self) -> list[bytes]:
        """What comes before the first token."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([{"index": i, "delta": delta, "finish_reason": None}]) for i in range(len(self.answers))]

    def stream(self, event: Event) -> list[bytes]:
        """What a token adds."""
        self.add(event)
        index, chunks = self.index(event), []
        if self._is_chat:
            if event.text:
                chunks.append({"index": index, "delta": {"content": event.text}, "finish_reason": None})
            if event.end_reason:
                chunks.append({"index": index, "delta": {}, "finish_reason": event.end_reason})
        elif event.text or event.end_reason:
            chunks.append({"index": index, "text": event.text, "logprobs": None, "finish_reason": event.end_reason})
        return [self._chunk([choice]) for choice in chunks]

    def end_stream(self, with_usage: bool) -> list[bytes]:
        """What comes behind the last token."""
        return [*([self._chunk([], self.usage)] if with_usage else []), DONE]

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else self._kind
        body = {**self._head, "object": kind, "choices": choices, **({"usage": usage} if usage else {})}
        return sent(body)


def sent(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode(errors="replace") + b"\n\n"


def list_logprobs(
    tokenizer: Tokenizer, prompt: Sequence[int], before: str, answer: Answer, is_echoed: bool
) -> dict[str, list[Any]]:
    """OpenAI's lists beside each other: tokens, token_logprobs, top_logprobs, text_offset.

    A token's own log-probability stands among the likeliest too; the first token of a text has none.
    """
    ids, scores = [*prompt, *answer.ids], [None, *answer.logprobs]
    offsets = [0] * len(prompt)
    if is_echoed:
        offsets = _offsets(tokenizer, prompt, 0)
    offsets += _offsets(tokenizer, answer.ids, len(before))
    shown = slice(0 if is_echoed else len(prompt), None)
    tops: list[dict[str, float] | None] = []
    for token, score in zip(ids[shown], scores[shown], strict=True):
        if score is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for likely, logprob in [*score.top, (token, score.logprob)]:
            top.setdefault(token_text(tokenizer, likely), logprob)
        tops.append(top)
    return {
        "tokens": [token_text(tokenizer, token) for token in ids[shown]],
        "token_logprobs": [None if score is None else score.logprob for score in scores[shown]],
        "top_logprobs": tops,
        "text_offset": offsets[shown],
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text of its own; part of a character as bytes:\\xe4; "" for a row that pads the vocabulary."""
    data = tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _offsets(tokenizer: Tokenizer, ids: Sequence[int], start: int) -> list[int]:
    """Where in the text each token begins; all tokens of one character where it does."""
    stream, offsets = TextStream(tokenizer), []
    for token in ids:
        offsets.append(start)
        start += len(stream.push(token))
    return offsets
