"""What preparation writes for a comparison: a row of facts for each answer, then all answers' ids.

A record is stored as uint32 cells:

    K, line in its file, then for each answer (length, bits of its fp32 grade, 64 bits that stand for its text),
    then the ids of each answer's sequence: the prompt, the answer, its end token

in which the compared answer's ids carry the flag TRAINED, and those of earlier turns do not. A candidate of a table
is a record with K = 1; its group is put together when all of them are there (`groups.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from engine.data.conversations import question_hash
from engine.data.encoders import Stored, TemplateEncoder, fit_each
from engine.data.preferences import Comparison, load, spread
from engine.data.records import Record
from engine.data.shards import TRAINED
from model.chat import ChatTemplate, ConversationError, Encoded, Message, drop_turns
from model.tokenizer import Tokenizer

HEAD = 2  # cells before the answers' facts
FACTS = 4  # cells of each answer's facts


class Answers(NamedTuple):
    """The answers of a stored record.

    ids: a sequence each, uint32, flagged.
    grades: fp32 [K].
    """

    ids: list[np.ndarray]
    grades: np.ndarray


def unpack(cells: np.ndarray) -> Answers:
    """The answers of a record from its cells."""
    count = int(cells[0])
    facts = cells[HEAD : HEAD + FACTS * count].reshape(count, FACTS)
    ends = np.cumsum(facts[:, 0])
    return Answers(np.split(cells[HEAD + FACTS * count :], ends[:-1]), facts[:, 1].copy().view("<f4"))


class RankedEncoder(TemplateEncoder):
    """Comparisons under a template, at most `max_responses` answers each, shortened to a context together."""

    source = kind = "preferences"

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, context: int, max_responses: int) -> None:
        super().__init__(template, tokenizer, context, max_responses)
        self._max_responses = max_responses

    def encode(self, records: Sequence[Record]) -> Iterator[Stored]:
        found = [load(record.text or "") for record in records]
        kept = [spread([response.grade for response in each.responses], self._max_responses) for each in found]
        conversations = [
            [[*each.prompt, Message("assistant", each.responses[place].text)] for place in places]
            for each, places in zip(found, kept, strict=True)
        ]
        fitted = iter(
            fit_each(self._template, self.tokenizer, [one for some in conversations for one in some], self._context)
        )
        for record, each, places, asked in zip(records, found, kept, conversations, strict=True):
            try:
                encoded = self._alike(asked, [next(fitted) for _ in places])
            except ConversationError as error:
                yield Stored(None, reason=str(error))
                continue
            yield self._stored(record.line, each, places, encoded)

    def _alike(self, conversations: list[list[Message]], fitted: list[Encoded | ConversationError]) -> list[Encoded]:
        """The answers of one comparison under one prompt: what has to be left out of it for one is for all.

        Raises:
            ConversationError: one of them cannot be used whole.
        """
        whole: list[Encoded] = []
        for number, result in enumerate(fitted, 1):
            if isinstance(result, ConversationError):
                raise result
            if result.is_cut:
                raise ConversationError(
                    f"answer {number} and its question exceed the context of {self._context} tokens"
                )
            whole.append(result)
        turns = max(result.dropped_turns for result in whole)
        for index, result in enumerate(whole):
            if result.dropped_turns < turns:
                shorter = self._template.encode(self.tokenizer, drop_turns(conversations[index], turns))
                whole[index] = shorter._replace(dropped_turns=turns)
        return whole

    def _stored(self, line: int, found: Comparison, places: list[int], encoded: list[Encoded]) -> Stored:
        responses = [found.responses[place] for place in places]
        facts = np.zeros((len(places), FACTS), self.dtype)
        facts[:, 0] = [len(each.ids) for each in encoded]
        facts[:, 1] = np.array([response.grade for response in responses], "<f4").view(self.dtype)
        hashes = b"".join(digest(response.text.strip()) for response in responses)
        facts[:, 2:] = np.frombuffer(hashes, self.dtype).reshape(-1, 2)
        head = np.array([len(places), line], self.dtype)
        cells = np.concatenate([head, facts.ravel(), *(self._flagged(each) for each in encoded)])
        dropped = encoded[0].dropped_turns
        counts = {
            "responses": len(places),
            "beyond_most": len(found.responses) - len(places),
            "with_margins": int(found.has_margins),
            "shortened": int(dropped > 0),
            "dropped_turns": dropped,
        }
        characters = sum(len(message.content) for message in found.prompt) + sum(len(text) for text, _ in responses)
        return Stored(cells, characters, comparison_hash(found), counts)

    def _flagged(self, encoded: Encoded) -> np.ndarray:
        """The ids of a sequence; those of its last answer, which ends it, are flagged."""
        ids = np.array(encoded.ids, self.dtype)
        before = np.flatnonzero(~np.array(encoded.trained, bool))
        ids[before[-1] + 1 if len(before) else 0 :] |= TRAINED
        return ids


def comparison_hash(found: Comparison) -> bytes:
    """128 bits: 64 that stand for the prompt with all answers and grades (of a candidate, for the prompt alone), then
    64 for the first question, whose spaces do not count."""
    prompt = [(message.role, message.content) for message in found.prompt]
    answers = [] if found.is_candidate else sorted(found.responses)
    first = next(message.content for message in found.prompt if message.role == "user")
    return digest(json.dumps([prompt, answers])) + question_hash(first)


def digest(text: str) -> bytes:
    """64 bits that stand for a text."""
    return blake2b(text.encode(), digest_size=8).digest()
