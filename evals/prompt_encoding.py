"""Prompts and options in ids.

    text        bos where the base's tokenizer puts it before a document, then the ids of the text; of an empty text
                bos, or eos where the base has none
    messages    what the chat template writes, up to the header of the assistant's next turn

An option's ids are those by which the ids of prompt + option exceed the prompt's, so that a letter behind "答案：" is
the token that a tokenizer gives it there; white space at the end of a prompt belongs to the option. That is how
lm-evaluation-harness encodes them (`TemplateLM._encode_pair`), and its numbers come out equal. Behind messages an
option is encoded by itself, as the template's own answers are.

What exceeds the context is shortened, and says by how much: messages lose their oldest turns whole (a system message
stays), texts and single long turns their oldest tokens, bos among them, as in lm-evaluation-harness.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

from engine.model_directory import ModelDirectory
from evals.task import Prompt
from model.chat import ChatTemplate, ConversationError, drop_turns, fit_prompt
from model.errors import InputError


class Encoded(NamedTuple):
    """A prompt in ids, and how it was shortened.

    dropped: oldest turns that were left out.
    cut: oldest tokens that were left out.
    """

    ids: list[int]
    dropped: int = 0
    cut: int = 0


class PromptEncoder:
    """Ids for a model.

    Args:
        context: the longest prompt with what follows it; at least 2.
    Attributes:
        tokenizer, template: of the directory.
    """

    def __init__(self, directory: ModelDirectory, context: int) -> None:
        self._directory, self._context = directory, context
        self.tokenizer, self.template = directory.tokenizer, directory.template
        self._first = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def prompt(self, prompt: Prompt, following: int, least: int | None = None) -> Encoded:
        """A prompt that leaves room for `following` more tokens; a last question that does not, for `least` of them.

        Raises:
            InputError: messages, where there is no template.
            ConversationError: messages that the template refuses.
        """
        if isinstance(prompt, str):
            return self._cut(self._document(prompt), following)
        template = self._require_template()
        for space in (following, following if least is None else least):
            with contextlib.suppress(ConversationError):
                return Encoded(*fit_prompt(template, self.tokenizer, prompt, self._context - space + 1))
        earlier = max(sum(message.role == "user" for message in prompt) - 1, 0)
        ids = template.encode_prompt(self.tokenizer, drop_turns(prompt, earlier))
        return self._cut(ids, following)._replace(dropped=earlier)

    def pair(self, prompt: Prompt, options: Sequence[str]) -> tuple[Encoded, list[list[int]]]:
        """A prompt that leaves room for the longest option, and the options.

        Raises:
            InputError: as `prompt`.
            ConversationError: as `prompt`; or an option is empty, or alone longer than the context.
        """
        begun, own = self._join(prompt, options) if isinstance(prompt, str) else ([], self._behind(options))
        for option, ids in zip(options, own, strict=True):
            if not 0 < len(ids) <= self._context:
                size = f"takes {len(ids):,} tokens of a context of {self._context:,}" if ids else "is empty"
                raise ConversationError(f"the option {option[:30]!r} {size}")
        following = max(map(len, own)) - 1  # nobody asks what its last token predicts
        return self._cut(begun, following) if begun else self.prompt(prompt, following), own

    def windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """(what stands before, what is read) in turn, so that every token of a text is read once.

        The first window begins with bos (eos where the base has none) and fills the context; each of the others reads
        the next half of a context behind the half before it.
        """
        ids, size = self.tokenizer.encode(text), self._context
        half = size // 2
        starts = range(size, len(ids), size - half + 1)
        first = [([self._first], ids[:size])] if ids else []
        return [*first, *((ids[start - half : start], ids[start : start + size - half + 1]) for start in starts)]

    def fits(self, prompt: Prompt, following: int) -> bool:
        """Whether nothing of a prompt has to go for so many more tokens. Raises as `prompt`."""
        if isinstance(prompt, str):
            return len(self._document(prompt)) + following <= self._context
        return len(self._require_template().encode_prompt(self.tokenizer, prompt)) + following <= self._context

    def _join(self, prompt: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        before = prompt.rstrip()
        if not before:
            return [self._first], self.tokenizer.encode_batch([prompt + option for option in options])
        moved = [prompt[len(before) :] + option for option in options]
        begin = [self._first] if self.tokenizer.add_bos else []
        alone, *joint = self.tokenizer.encode_batch([before, *(before + option for option in moved)])
        own = [ids[len(alone) :] for ids in joint]
        if not all(own):
            # The end of the prompt and the option are one token: the option is read as if it were not.
            own = [ids or apart for ids, apart in zip(own, self._behind(moved), strict=True)]
        return [*begin, *alone], own

    def _behind(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts, is_continuation=True)

    def _document(self, text: str) -> list[int]:
        begin = [self._first] if self.tokenizer.add_bos else []
        return [*begin, *self.tokenizer.encode(text)] or [self._first]

    def _cut(self, ids: list[int], following: int) -> Encoded:
        cut = max(0, len(ids) + following - self._context)
        return Encoded(ids[cut:], 0, cut)

    def _require_template(self) -> ChatTemplate:
        if self.template is None:
            raise InputError(
                f"{self._directory.path} stores no chat template. Ask with prompting=plain, or name one in --template."
            )
        return self.template
