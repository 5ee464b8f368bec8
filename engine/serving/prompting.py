"""From a client's words to the generator's requests: prompts in ids, options, seeds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from engine.model_directory import ModelDirectory
from engine.serving.errors import ApiError
from engine.serving.limits import Limits
from engine.serving.schema import ChatMessage, ChatRequest, CompletionRequest, Sampled
from model.chat import ConversationError, Message
from model.errors import InputError
from model.generate import Request
from model.sampling import SamplingOptions, row_seed

Given = TypeVar("Given")
Ids = TypeVar("Ids")
COMPLETION_TOKENS = 16
"""Of a completion that does not say how long it may be, as at OpenAI."""


class Prompter:
    """Makes requests for one model.

    The tokenizer is used by one thread of its own, so that a long text holds up no stream.
    """

    def __init__(self, directory: ModelDirectory, limits: Limits) -> None:
        self._directory, self._limits = directory, limits
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def chat(self, asked: ChatRequest) -> Request:
        """Raises ApiError: the model does not chat, or not in this way; more tokens than may be."""
        given = [number for number in (asked.max_tokens, asked.max_completion_tokens) if number is not None]
        options = self._options(asked, min(given, default=self._limits.max_tokens))
        return self._request(await self._in_thread(self._encode_chat, asked.messages), options, asked, 0)

    async def completion(self, asked: CompletionRequest) -> list[Request]:
        """A request for each prompt. Raises ApiError: more tokens than may be, or a text that cannot be read."""
        tokens = COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        options = self._options(asked, max(tokens, 1))
        prompts = await self._in_thread(self._encode_texts, asked.prompts)
        return [self._request(ids, options, asked, place) for place, ids in enumerate(prompts)]

    async def _in_thread(self, encode: Callable[[Given], Ids], given: Given) -> Ids:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, encode, given)
        except (InputError, ConversationError) as error:
            raise ApiError(400, f"{str(error).rstrip('.')}.") from None

    def _encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        template = self._directory.template
        if template is None:
            raise InputError("This model stores no chat template. Use /v1/completions.")
        roles = ["system" if message.role == "developer" else message.role for message in messages]
        conversation = [Message(role, message.text) for role, message in zip(roles, messages, strict=True)]  # type: ignore[arg-type]
        return template.encode_prompt(self._directory.tokenizer, conversation)

    def _encode_texts(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """As documents begin in training: behind bos, where the base has one there."""
        tokenizer = self._directory.tokenizer
        begin = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        return [begin + tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

    def _options(self, asked: Sampled, max_tokens: int) -> SamplingOptions:
        most = self._limits.max_tokens
        if max_tokens > most:
            raise ApiError(400, f"{max_tokens} tokens are asked for. Ask for at most {most}.", "max_tokens_exceeded")
        drawn: dict[str, Any] = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(asked, name)) is not None
        }
        return SamplingOptions(
            **drawn, max_new_tokens=max_tokens, stop_ids=self._directory.stop_ids, stop_texts=asked.stop_texts
        )

    def _request(self, ids: list[int], options: SamplingOptions, asked: Sampled, place: int) -> Request:
        seed = secrets.randbits(63) if asked.seed is None else row_seed(asked.seed, place) if place else asked.seed
        return Request(ids, options, asked.n or 1, seed)
