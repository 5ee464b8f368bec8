"""Answers that a model has sampled, to be trained on by the very ids that were sampled.

Decoding and encoding an answer again may give other ids: a sampler is free to spell a word in pieces that the tokenizer
would join, to end in spaces that a template strips, or to break a character off. So the ids of a record are stored as
they are, those of the answer marked as trained. The record's messages are there for people, and for the split by
questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, ClassVar

import numpy as np

from engine.data.conversation_files import ConversationOptions, ConversationSchema
from engine.data.conversations import question_hash
from engine.data.encoders import Stored, TemplateEncoder
from engine.data.records import Record, RecordError
from engine.data.shards import TRAINED
from engine.data.sources import only


@dataclass(frozen=True)
class _SampledSchema(ConversationSchema):
    advice: ClassVar[str] = "Give files that tools/rejection.py has written."

    def text(self, value: Any) -> str:
        if not isinstance(value, dict) or not {"messages", "prompt_ids", "answer_ids"} <= value.keys():
            raise RecordError("it lacks messages, prompt_ids or answer_ids")
        return json.dumps(value)


@dataclass
class SampledOptions(ConversationOptions):
    """How records with sampled ids are read: {"messages": [...], "prompt_ids": [...], "answer_ids": [...]}."""

    @property
    def schema(self) -> ConversationSchema:
        return _SampledSchema({}, None, False)

    def bare(self) -> ConversationOptions:
        return only(SampledOptions, self)


class SampledEncoder(TemplateEncoder):
    """Stores a record's ids, prompt before answer; nothing but the answer is trained. The template is the one that the
    prompts were written by."""

    source = "sampled"

    def encode(self, records: Sequence[Record]) -> Iterator[Stored]:
        for record in records:
            value = json.loads(record.text or "")
            prompt, answer = value["prompt_ids"], value["answer_ids"]
            if len(prompt) + len(answer) > self._context:
                reason = f"it has {len(prompt) + len(answer)} tokens, more than a context of {self._context}"
                yield Stored(None, reason=reason)
                continue
            ids = np.array([*prompt, *answer], self.dtype)
            ids[len(prompt) :] |= TRAINED
            contents = [message["content"] for message in value["messages"]]
            question = next(message["content"] for message in value["messages"] if message["role"] == "user")
            digest = blake2b(ids.tobytes(), digest_size=8).digest() + question_hash(question)
            counts = {"answers": 1, "trained": len(answer)}
            yield Stored(ids, sum(map(len, contents)), digest, counts)
