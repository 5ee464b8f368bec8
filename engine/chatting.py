"""A model directory that answers: its weights, its tokenizer, its chat template and the tokens at which it stops."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from engine.conversion import DTYPES, end_ids
from engine.inspection import is_scorer
from engine.publish import require_model
from model.chat import ChatTemplate, Conversation, ConversationError, Message, fit_prompt, resolve_template
from model.errors import InputError
from model.generate import Event, Generator, Request
from model.sampling import SamplingOptions, row_seed
from model.tokenizer import Tokenizer, has_tokenizer
from model.weight_files import TensorStore, read_json

DISCLAIMER = (
    "Answers are written by a model and may be wrong. They do not replace a doctor's advice.\n"
    "回答由模型生成，可能有误，不能代替医生的诊断和治疗建议。"
)
# Of a file of weights, for its fingerprint: every run changes nearly all weights, so samples tell models apart.
_SAMPLED_BLOCKS, _BLOCK_BYTES = 256, 1 << 16


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


class ChatModel:
    """What chatting needs of a model directory.

    stop_ids: the template's end token, and whatever else the directory says ends an answer, so that answers end where
        transformers' `generate` ends them.
    """

    def __init__(
        self, directory: Path, generator: Generator, template: ChatTemplate, stop_ids: tuple[int, ...]
    ) -> None:
        """Use `open`."""
        assert generator.tokenizer is not None
        self.directory, self.generator, self.template, self.stop_ids = directory, generator, template, stop_ids
        self.tokenizer: Tokenizer = generator.tokenizer

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
            template: "auto" for the directory's own; a name, or a file in .jinja.
            dtype: one of `engine.conversion.DTYPES`; auto: bfloat16 on a GPU, float32 on a CPU.
            device, context, max_rows: as in `Generator`.
        Raises:
            InputError: it is no model, not whole, or one that does not chat.
        """
        device = _checked_device(device)
        if not Path(model).is_dir():
            raise InputError(f"--model {model}: there is no such directory. Run tools/sft.py first, or give another.")
        directory = require_model(model)
        if is_scorer(read_json(directory / "config.json")):
            raise InputError(f"{directory} is a reward model: it scores answers and gives none. Chat with another.")
        if not has_tokenizer(directory):
            raise InputError(f"{directory} holds no tokenizer. Copy its files from the model that it was trained from.")
        tokenizer = Tokenizer.load(directory)
        if template == "auto" and ChatTemplate.of(tokenizer) is None:
            raise InputError(
                f"{directory} stores no chat template. Name the one it was trained with, as in --chat.template chimed."
            )
        chat_template = resolve_template(template, tokenizer)
        generator = Generator.from_directory(
            directory,
            tokenizer=tokenizer,
            device=device,
            dtype=None if dtype == "auto" else DTYPES[dtype],
            context=context,
            max_rows=max_rows,
        )
        ends = dict.fromkeys((*chat_template.end_ids(tokenizer), *end_ids(generator.config, directory)))
        return cls(directory, generator, chat_template, tuple(ends))

    @cached_property
    def fingerprint(self) -> str:
        """128 bits in hex over the configuration, the tokenizer and samples of every file of weights: 16 MB of a
        large one, all of a small one."""
        digest = hashlib.sha256(f"{self.generator.config} {self.tokenizer.fingerprint}".encode())
        for path in TensorStore(self.directory).files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with open(path, "rb") as file:
                for block in range(_SAMPLED_BLOCKS):
                    file.seek(block * size // _SAMPLED_BLOCKS)
                    digest.update(file.read(_BLOCK_BYTES))
        return digest.hexdigest()[:32]

    def prompt(self, conversation: Conversation, max_new_tokens: int) -> Prompt:
        """The ids after which the answer begins.

        The oldest turns are left out whole until the longest answer has room, or a quarter of the context if it is
        longer than that. A last question that leaves less still gets what there is.

        Raises:
            ConversationError: the last question alone takes the context, or the conversation cannot be used.
        """
        context = self.generator.context
        room = min(max_new_tokens, context // 4)
        try:
            return Prompt(*fit_prompt(self.template, self.tokenizer, conversation, context - room + 1))
        except ConversationError:
            return Prompt(*fit_prompt(self.template, self.tokenizer, conversation, context))


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


def _checked_device(name: str | None) -> str | None:
    if name is None:
        return None
    found = re.fullmatch("cpu|cuda(?::([0-9]+))?", name)
    if found is None:
        raise InputError(f"--device {name}: no such device. Use cuda, cuda:1 or cpu.")
    if name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there is no such GPU here. Use another, or cpu.")
    return name
