"""A model directory that answers: its weights, its tokenizer, its chat template and the tokens at which it stops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.model_directory import ModelDirectory, resolve_device
from model.chat import ChatTemplate, Conversation, ConversationError, Message, fit_prompt
from model.errors import InputError
from model.generate import Event, Generator, Request
from model.sampling import SamplingOptions, row_seed
from model.tokenizer import Tokenizer

DISCLAIMER = (
    "Answers are written by a model and may be wrong. They do not replace a doctor's advice.\n"
    "回答由模型生成，可能有误，不能代替医生的诊断和治疗建议。"
)


@dataclass
class SamplingConfig:
    """How answers are drawn."""

    temperature: float = 1.0
    """divides the logits; 0 takes the likeliest token"""
    top_p: float = 0.9
    """keep the likeliest tokens that hold this much probability together; 1 keeps all"""
    top_k: int = 0
    """keep the k likeliest tokens; 0 keeps all"""
    min_p: float = 0.0
    """keep tokens at least this likely relative to the likeliest; 0 keeps all"""
    repetition_penalty: float = 1.0
    """divides the logits of tokens that were there before; 1 is none"""
    max_new_tokens: int = 512
    """longest answer"""
    stop: list[str] = field(default_factory=list)
    """texts that end an answer and do not belong to it"""

    def options(self, stop_ids: Sequence[int]) -> SamplingOptions:
        """The same for the generator. Raises InputError: a value outside its range."""
        values = {name: value for name, value in vars(self).items() if name != "stop"}
        return SamplingOptions(stop_ids=tuple(stop_ids), stop_texts=tuple(self.stop), **values)


class Prompt(NamedTuple):
    """A conversation up to the header of the answer; the oldest turns are left out where it is too long."""

    ids: list[int]
    dropped_turns: int


def fit_question(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, context: int, max_new_tokens: int
) -> Prompt:
    """The ids after which an answer begins, without the oldest turns if they do not fit; see `ChatModel.prompt`."""
    try:
        return Prompt(*fit_prompt(template, tokenizer, conversation, context - room(context, max_new_tokens) + 1))
    except ConversationError:
        return Prompt(*fit_prompt(template, tokenizer, conversation, context))


def room(context: int, max_new_tokens: int) -> int:
    """Of a context, the tokens that are left to an answer: the longest one, or a quarter if that is less."""
    return min(max_new_tokens, context // 4)


class ChatModel:
    """What chatting needs of a model directory: its parts, a template among them, and its weights."""

    def __init__(self, directory: ModelDirectory, generator: Generator) -> None:
        """Use `open`."""
        assert directory.template is not None
        self.directory, self.generator, self.template = directory, generator, directory.template
        self.tokenizer, self.stop_ids = directory.tokenizer, directory.stop_ids

    @classmethod
    def open(
        cls,
        model: str,
        template: str = "auto",
        *,
        device: str | None = None,
        dtype: str = "auto",
        context: int | None = None,
        max_rows: int = 1,
    ) -> ChatModel:
        """Read a directory.

        Args:
            template: as in `ModelDirectory.open`.
            device, dtype, context, max_rows: as in `ModelDirectory.generator`.
        Raises:
            InputError: it is no model, not whole, or one that does not chat.
        """
        resolve_device(device)  # before anything is read
        directory = ModelDirectory.open(model, template)
        if directory.template is None:
            raise InputError(
                f"{model} stores no chat template. Name the one it was trained with, as in --chat.template chimed."
            )
        return cls(directory, directory.generator(device=device, dtype=dtype, context=context, max_rows=max_rows))

    @property
    def fingerprint(self) -> str:
        """Of everything in the directory that decides answers."""
        return self.directory.fingerprint

    def prompt(self, conversation: Conversation, max_new_tokens: int) -> Prompt:
        """The ids after which the answer begins.

        The oldest turns are left out whole until the longest answer has room, or a quarter of the context if it is
        longer than that. A last question that leaves less still gets what there is.

        Raises:
            ConversationError: the last question alone takes the context, or the conversation cannot be used.
        """
        return fit_question(self.template, self.tokenizer, conversation, self.generator.context, max_new_tokens)


class Chat:
    """One conversation with a model.

    system: system message, "" for none.
    turns: what was said, user and assistant in turn.
    dropped_turns: how many of the oldest turns the last answer was given without.
    """

    def __init__(self, model: ChatModel, sampling: SamplingConfig, system: str = "", seed: int = 0) -> None:
        self.model, self.sampling, self.system = model, sampling, system
        self.turns: list[Message] = []
        self.dropped_turns = 0
        self._seed, self._answers = seed, 0

    @property
    def messages(self) -> list[Message]:
        return [*([Message("system", self.system)] if self.system else []), *self.turns]

    def ask(self, question: str) -> Iterator[Event]:
        """The answer, token by token. Question and answer join the conversation when the iterator ends or is closed;
        a question that is not answered by a single character does not.

        Raises:
            ConversationError: the question takes the whole context.
        """
        asked = Message("user", question)
        prompt = self.model.prompt([*self.messages, asked], self.sampling.max_new_tokens)
        self.dropped_turns = prompt.dropped_turns
        options = self.sampling.options(self.model.stop_ids)
        request = Request(prompt.ids, options, seed=row_seed(self._seed, self._answers))
        self._answers += 1
        pieces: list[str] = []
        events = self.model.generator.stream([request])
        try:
            for event in events:
                pieces.append(event.text)
                yield event
        finally:
            events.close()  # type: ignore[attr-defined]
            if "".join(pieces).strip():
                self.turns += [asked, Message("assistant", "".join(pieces))]
