"""What preparation writes for a record: the ids of a text, or those of a conversation with the trained ones marked."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from engine.data.conversations import conversation_hash, load
from engine.data.records import Record
from engine.data.shards import TRAINED, text_hash
from model.chat import ChatTemplate, Conversation, ConversationError, Encoded, fit_batch
from model.errors import InputError
from model.tokenizer import Tokenizer

_NOTHING: Mapping[str, int] = MappingProxyType({})


class TextTokenizer(Protocol):
    """What the preparation of texts needs of a tokenizer."""

    vocab_size: int
    eos_id: int
    add_bos: bool

    @property
    def bos_id(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: list[str], /) -> list[list[int]]: ...

    def save(self, directory: Path, /) -> None: ...


class Stored(NamedTuple):
    """A record as it is stored, or why it is not.

    ids: [L], of the encoder's dtype.
    characters: Unicode code points of its text.
    digest: 128 bits that stand for it; the second half decides whether it is held out.
    counts: what else there is to count, by the names in `FileOptions.counts`.
    """

    ids: np.ndarray | None
    characters: int = 0
    digest: bytes = b""
    counts: Mapping[str, int] = _NOTHING
    reason: str = ""


class Encoder(ABC):
    """Makes of records what a shard holds. Picklable, and unpickled without torch.

    tokenizer: its ids are stored.
    dtype: of a shard.
    fingerprint: over all that decides ids.
    facts: what the manifest says beside what it says of texts.
    """

    tokenizer: TextTokenizer
    dtype: np.dtype
    fingerprint: str
    facts: Mapping[str, Any]

    @abstractmethod
    def encode(self, records: Sequence[Record]) -> Iterator[Stored]:
        """What is stored of each record; all of them have texts."""


class TextEncoder(Encoder):
    """[bos] ids [eos]; a document in several records has one of each."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer
        self.facts = {}
        largest = max(tokenizer.vocab_size - 1, tokenizer.eos_id, tokenizer.bos_id or 0)
        self.dtype = np.dtype("<u2" if largest < 1 << 16 else "<u4")
        self.fingerprint = tokenizer.fingerprint

    def encode(self, records: Sequence[Record]) -> Iterator[Stored]:
        texts = [record.text or "" for record in records]
        begin = [self.tokenizer.bos_id] if self.tokenizer.add_bos else []
        for record, text, ids in zip(records, texts, self.tokenizer.encode_batch(texts), strict=True):
            whole = [*(begin if record.is_first else []), *ids, *([self.tokenizer.eos_id] if record.is_last else [])]
            counts = {"divided": int(record.is_first and not record.is_last)}
            yield Stored(np.array(whole, self.dtype), len(text), text_hash(text), counts)


class TemplateEncoder(Encoder):
    """Conversations as a template writes them, within a context; ids that are trained carry the flag TRAINED."""

    tokenizer: Tokenizer
    source: ClassVar[str]
    """what is encoded"""
    kind: ClassVar[str] = "conversations"
    """what a shard holds then"""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, context: int, *decisive: Any) -> None:
        """`decisive`: what else decides ids."""
        assert tokenizer.vocab_size < TRAINED
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u4")
        self._template = template
        self._context = context
        facts = [self.source, tokenizer.fingerprint, template.fingerprint, context, *decisive]
        self.fingerprint = blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        self.facts = {
            "kind": self.kind,
            "encoder": self.fingerprint,
            "template": template.fingerprint,
            "context": context,
        }


class ChatEncoder(TemplateEncoder):
    """Raw conversations, shortened to the context."""

    source = "conversations"

    def encode(self, records: Sequence[Record]) -> Iterator[Stored]:
        conversations = [load(record.text or "").messages for record in records]
        answered = [messages[:-1] if messages[-1].role == "user" else messages for messages in conversations]
        usable = [messages for messages in answered if messages and messages[-1].role == "assistant"]
        fitted = iter(fit_each(self._template, self.tokenizer, usable, self._context))
        for all_messages, messages in zip(conversations, answered, strict=True):
            if not messages or messages[-1].role != "assistant":
                yield Stored(None, reason="it holds no answer")
                continue
            encoded = next(fitted)
            if isinstance(encoded, ConversationError):
                yield Stored(None, reason=str(encoded))
            else:
                yield self._stored(messages, encoded, is_unanswered=len(messages) < len(all_messages))

    def _stored(self, messages: Conversation, encoded: Encoded, is_unanswered: bool) -> Stored:
        ids = np.array(encoded.ids, self.dtype)
        trained = np.array(encoded.trained, bool)
        ids[trained] |= TRAINED
        counts = {
            "answers": sum(message.role == "assistant" for message in messages) - encoded.dropped_turns,
            "trained": int(trained.sum()),
            "unanswered": int(is_unanswered),
            "shortened": int(encoded.dropped_turns > 0),
            "dropped_turns": encoded.dropped_turns,
            "cut": int(encoded.is_cut),
        }
        characters = sum(len(message.content) for message in messages)
        return Stored(ids, characters, conversation_hash(messages), counts)


def fit_each(
    template: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Conversation], context: int
) -> list[Encoded | ConversationError]:
    """As `fit_batch`, where a template may also refuse some of the conversations (a system prompt, perhaps)."""
    try:
        return fit_batch(template, tokenizer, conversations, context)
    except InputError as error:
        if len(conversations) == 1:
            return [ConversationError(str(error).removesuffix("."))]
        return [fit_each(template, tokenizer, [conversation], context)[0] for conversation in conversations]


def as_encoder(given: TextTokenizer | Encoder) -> Encoder:
    """A tokenizer by itself stands for the encoder of texts."""
    return given if isinstance(given, Encoder) else TextEncoder(given)
