"""Conversations in a model's format: one chat template for training, generation and every serving engine.

A template is a Jinja program, as Hugging Face stores it beside a model. Named ones are in `chat_templates.py`; a base
may bring its own. All are rendered by `chat_jinja.py`; where answers lie in the text is found by `chat_layout.py`;
`chat_encoding.py` makes ids of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from model.chat_encoding import ConversationEncoder, Encoded
from model.chat_jinja import TemplateProgram
from model.chat_layout import Conversation, ConversationError, Message, Role
from model.chat_templates import NAMED_TEMPLATES
from model.errors import InputError
from model.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Conversation",
    "ConversationError",
    "Encoded",
    "Message",
    "Role",
    "drop_turns",
    "fit",
    "fit_batch",
    "fit_prompt",
    "resolve_template",
]

_FILE = "chat_template.jinja"


class ChatTemplate:
    """How a conversation is written down. Picklable.

    Attributes:
        source: the Jinja text, as it is stored in a model directory.
        name: "chimed", "ziya", "vicuna", "llama2", "llama3", "chatml", "alpaca", "plain", or "own".
    """

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        """Use `named`, `of` or `resolve_template`.

        Args:
            variables: the tokenizer's bos_token, eos_token and their kind, which the source may name.
            where: what messages call the template.
        """
        self.source = source
        self.name = next((name for name, known in NAMED_TEMPLATES.items() if known.source == source), "own")
        self._variables = dict(variables)
        self._where = where
        self._encoders: list[tuple[Tokenizer, ConversationEncoder]] = []  # of the tokenizer used last

    @classmethod
    def named(cls, name: str, tokenizer: Tokenizer) -> ChatTemplate:
        """One of the templates that this project knows.

        Raises:
            InputError: no template of this name, or the tokenizer lacks a token that it needs.
        """
        if name not in NAMED_TEMPLATES:
            raise InputError(
                f"{name}: no such chat template. Name one of {', '.join(NAMED_TEMPLATES)}, or a file that ends in "
                ".jinja."
            )
        template = NAMED_TEMPLATES[name]
        known = {token.content for token in tokenizer.added_tokens.values()}
        missing = [need for need in template.needs if need not in known and need not in tokenizer.special_names]
        if missing:
            raise InputError(
                f"{tokenizer.source}: its tokenizer has no {missing[0]}, which the chat template {name} needs. Choose "
                "chimed, vicuna, alpaca or plain, which any tokenizer can write, or a base that has it."
            )
        return cls(template.source, tokenizer.special_names, name)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that a directory stores: chat_template.jinja, else "chat_template" in its
        tokenizer_config.json; None where there is none.

        Raises:
            InputError: it is not readable, or has no default.
        """
        if _FILE in tokenizer.files:
            where = str(tokenizer.source / _FILE)
            return cls(_decode(tokenizer.files[_FILE], where), tokenizer.special_names, where)
        where = str(tokenizer.source / "tokenizer_config.json")
        stored: Any = tokenizer.config.get("chat_template")
        if isinstance(stored, list):
            stored = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        if isinstance(stored, dict):
            if not isinstance(stored.get("default"), str):
                names = ", ".join(map(str, stored))
                raise InputError(f"{where}: none of its chat templates ({names}) is named default. Name one so.")
            stored = stored["default"]
        if stored is None:
            return None
        if not isinstance(stored, str):
            raise InputError(f'{where}: "chat_template" is no text. Fetch the file again.')
        return cls(stored, tokenizer.special_names, where)

    def store(self, tokenizer: Tokenizer) -> Tokenizer:
        """A tokenizer that saves this template with itself: as a file, which transformers writes today, and in
        tokenizer_config.json, which its older versions and other engines read."""
        stored = copy.copy(tokenizer)
        stored.config = {**tokenizer.config, "chat_template": self.source}
        stored.files = {**tokenizer.files, _FILE: self.source.encode()}
        return stored

    @cached_property
    def fingerprint(self) -> str:
        """128 bits in hex over what decides a rendering."""
        decisive = json.dumps([self.source, sorted(self._variables.items())])
        return hashlib.sha256(decisive.encode()).hexdigest()[:32]

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text that transformers' `apply_chat_template(tokenize=False)` gives.

        Raises:
            InputError: the template refuses the conversation.
        """
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        return self._program.render(messages, add_generation_prompt)

    def check(self, tokenizer: Tokenizer) -> None:
        """See that the template and the tokenizer go together, before hours of work.

        Raises:
            InputError: no answer can be trained or ended with them.
        """
        self.encode(tokenizer, [Message("user", "a"), Message("assistant", "b")])

    def encode(self, tokenizer: Tokenizer, conversation: Conversation) -> Encoded:
        """A whole conversation for training, up to the end token of its last answer.

        For every k that ends before an answer, `encode_prompt(conversation[:k])` is a prefix of its ids.

        Raises:
            ConversationError: it cannot be used.
            InputError: template and tokenizer do not go together, or the template refuses the conversation.
        """
        return _only(self.encode_batch(tokenizer, [conversation]))

    def encode_batch(
        self, tokenizer: Tokenizer, conversations: Sequence[Conversation]
    ) -> list[Encoded | ConversationError]:
        """`encode` for many, several times faster; one that cannot be used gives its error."""
        return self._encoder(tokenizer).encode_batch(conversations, is_prompt=False)

    def encode_prompt(self, tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
        """A conversation and the header of the assistant's next turn, for generation. Raises as `encode`."""
        return _only(self._encoder(tokenizer).encode_batch([conversation], is_prompt=True)).ids

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer: the template's end token, then eos where that is another."""
        return tuple(dict.fromkeys((self._encoder(tokenizer).end_id, tokenizer.eos_id)))

    def _encoder(self, tokenizer: Tokenizer) -> ConversationEncoder:
        if not self._encoders or self._encoders[0][0] is not tokenizer:
            self._encoders = [(tokenizer, ConversationEncoder(self._program, tokenizer, self._where))]
        return self._encoders[0][1]

    @cached_property
    def _program(self) -> TemplateProgram:
        return TemplateProgram(self.source, self._variables, self._where)

    def __getstate__(self) -> dict[str, Any]:
        return {**{name: value for name, value in vars(self).items() if name != "_program"}, "_encoders": []}


def fit(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, context: int) -> Encoded:
    """Encode in at most `context` ids: the oldest turns are left out whole (a system message stays), then the last
    answer is cut, without an end token.

    Raises:
        ConversationError: the last question leaves no room for a token of its answer, or the conversation cannot be
            used.
    """
    return _only(fit_batch(template, tokenizer, [conversation], context))


def fit_batch(
    template: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Conversation], context: int
) -> list[Encoded | ConversationError]:
    """`fit` for many, several times faster; one that cannot be used gives its error."""
    results = template.encode_batch(tokenizer, conversations)
    for index, encoded in enumerate(results):
        if isinstance(encoded, Encoded) and len(encoded.ids) > context:
            try:
                results[index] = _shorten(template, tokenizer, conversations[index], context)
            except ConversationError as error:
                results[index] = error
    return results


def fit_prompt(
    template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, context: int
) -> tuple[list[int], int]:
    """A prompt that leaves room for one token in `context`, and the number of oldest turns left out for that.

    Raises:
        ConversationError: the last question alone takes the context.
    """
    ids = template.encode_prompt(tokenizer, conversation)
    if len(ids) < context:  # as nearly always
        return ids, 0
    shorter = _Shortened(conversation)
    dropped = shorter.fewest(lambda rest: len(template.encode_prompt(tokenizer, rest)) < context)
    ids = template.encode_prompt(tokenizer, shorter.without(dropped))
    if len(ids) >= context:
        raise ConversationError(f"its last question takes {len(ids)} tokens of a context of {context}")
    return ids, dropped


def _shorten(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, context: int) -> Encoded:
    shorter = _Shortened(conversation)
    dropped = shorter.fewest(lambda rest: len(template.encode(tokenizer, rest).ids) <= context)
    encoded = template.encode(tokenizer, shorter.without(dropped))
    if len(encoded.ids) <= context:
        return encoded._replace(dropped_turns=dropped)
    if not any(encoded.trained[:context]):
        needed = encoded.trained.index(True)
        raise ConversationError(f"its last question takes {needed} tokens of a context of {context}")
    return Encoded(encoded.ids[:context], encoded.trained[:context], dropped, is_cut=True)


def drop_turns(conversation: Conversation, turns: int) -> Conversation:
    """The conversation without so many of its oldest turns; a system message stays."""
    return _Shortened(conversation).without(turns)


class _Shortened:
    """A conversation without its oldest turns; a turn begins with a user's message, and the last one stays."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._starts = [index for index, message in enumerate(conversation) if message.role == "user"]

    def without(self, turns: int) -> Conversation:
        if turns == 0:
            return self._conversation
        system = [message for message in self._conversation[:1] if message.role == "system"]
        return [*system, *self._conversation[self._starts[turns] :]]

    def fewest(self, fits: Callable[[Conversation], bool]) -> int:
        """The fewest turns to leave out so that `fits(rest)`; all but one where nothing does."""
        low, high = 0, max(len(self._starts) - 1, 0)
        while low < high:
            middle = (low + high) // 2
            if fits(self.without(middle)):
                high = middle
            else:
                low = middle + 1
        return low


def resolve_template(asked: str, tokenizer: Tokenizer, replace: bool = False) -> ChatTemplate:
    """The template that a job works with.

    Args:
        asked: "auto" for the one stored beside the model, or chimed where none is; a name; or a file in .jinja.
        replace: whether another than the stored one may be asked for.
    Raises:
        InputError: it does not exist, does not go with the tokenizer, or differs from the stored one.
    """
    stored = ChatTemplate.of(tokenizer)
    if asked == "auto":
        template = stored or ChatTemplate.named("chimed", tokenizer)
    elif asked.endswith(".jinja"):
        try:
            source = _decode(Path(asked).read_bytes(), asked)
        except OSError as error:
            raise InputError(f"{asked}: cannot be read ({error.strerror}). Give a chat template's file.") from None
        template = ChatTemplate(source, tokenizer.special_names, asked)
    else:
        template = ChatTemplate.named(asked, tokenizer)
    if stored is not None and stored.source != template.source and not replace:
        raise InputError(
            f"{tokenizer.source}: it stores the chat template {stored.name}, but {asked} is asked for. Take the stored "
            "one with --chat.template auto, or train the model into another with --chat.replace true."
        )
    template.check(tokenizer)
    return template


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8. Fetch the file again.") from None


def _only(results: list[Encoded | ConversationError]) -> Encoded:
    [result] = results
    if isinstance(result, ConversationError):
        raise result
    return result
