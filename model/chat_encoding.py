"""From the layout of a rendered conversation to ids, and to which of them are trained.

The text is cut at the borders of answers. A prompt piece is encoded in one go, its special tokens read, as
transformers encodes a rendered prompt, and in the context it stands in: at the start of a text, or behind an end
token. An answer goes on from there: nothing is put before it or merged across the border, since generation, too,
starts from the finished ids of the prompt. Names of special tokens inside contents stay text.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

from model.chat_jinja import TemplateProgram
from model.chat_layout import Conversation, ConversationError, Layout, LayoutFinder, TemplateRefusal
from model.errors import InputError
from model.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """A conversation in tokens; the last is the end token of the last answer, unless it is cut.

    Attributes:
        trained: for every id, whether it is a target: those from the end of a prompt to the end token of its answer.
        dropped_turns: turns (a question with its answer) left out from the front.
        is_cut: whether the last answer lost its end.
    """

    ids: list[int]
    trained: list[bool]
    dropped_turns: int = 0
    is_cut: bool = False


class ConversationEncoder:
    """Encodes conversations under one template with one tokenizer.

    Raises:
        InputError: the two do not go together.
    """

    def __init__(self, program: TemplateProgram, tokenizer: Tokenizer, where: str) -> None:
        self._tokenizer = tokenizer
        # Runs of spaces and line breaks are added tokens in some vocabularies; they are nobody's markers.
        tokens = [token for token in tokenizer.added_tokens.values() if not token.content.isspace()]
        self._finder = LayoutFinder(program, _any_of(token.content for token in tokens), where)
        written = self._finder.literals(["user", "assistant", "user"])
        self._ids = {token.content: index for index, token in tokenizer.added_tokens.items()}
        self._markers = {token.content: token for token in tokens if token.special or token.content in written}
        self._marker_names = frozenset(self._markers)
        self._find_marker = _any_of(self._marker_names)
        self.end_id = self._ids[self._finder.end_token]
        behind = tokenizer.encode(self._finder.end_token + "a", allow_special=True)
        self._has_prefix_behind_token = behind == [self.end_id, *tokenizer.encode("a")]
        self._inserted: dict[str, list[int]] = {}

    def encode_batch(self, conversations: Sequence[Conversation], is_prompt: bool) -> list[Encoded | ConversationError]:
        """Each conversation in ids, or why it cannot be used."""
        layouts: list[Layout | ConversationError] = []
        for conversation in conversations:
            try:
                _check_characters(conversation)
                find = self._finder.prompt if is_prompt else self._finder.whole
                layout = find(conversation)
                if not (is_prompt or layout.answers):
                    raise ConversationError("no answer is in it")
                layouts.append(layout)
            except ConversationError as error:
                layouts.append(error)
            except InputError as error:
                layouts.append(TemplateRefusal(str(error)))
        good = [layout for layout in layouts if isinstance(layout, Layout)]
        prompts = iter(self._encode_prompts([piece for layout in good for piece in self._prompts(layout, is_prompt)]))
        answers = [layout.text[answer.start : answer.end] for layout in good for answer in layout.answers]
        continued = iter(self._continue(answers))
        results: list[Encoded | ConversationError] = []
        for found in layouts:
            if isinstance(found, ConversationError):
                results.append(found)
                continue
            ids: list[int] = []
            trained: list[bool] = []
            for answer in found.answers:
                ids += next(prompts)
                trained += [False] * (len(ids) - len(trained))
                if answer.start > answer.border:
                    ids += self._insert(found.text[answer.border : answer.start])
                ids += next(continued)
                ids.append(self.end_id)
                trained += [True] * (len(ids) - len(trained))
            if is_prompt:
                ids += next(prompts)
                trained += [False] * (len(ids) - len(trained))
            results.append(Encoded(ids, trained))
        return results

    def _prompts(self, layout: Layout, is_prompt: bool) -> list[tuple[Layout, int, int]]:
        """What is encoded in one go between answers: (layout, start, end)."""
        pieces, start = [], 0
        for answer in layout.answers:
            pieces.append((layout, start, answer.border))
            start = answer.end + len(self._finder.end_token)
        return [*pieces, (layout, start, len(layout.text))] if is_prompt else pieces

    def _encode_prompts(self, pieces: list[tuple[Layout, int, int]]) -> list[list[int]]:
        # A piece behind an answer is encoded behind the end token's text, which gives it its context.
        texts = [self._finder.end_token * (start > 0) + layout.text[start:end] for layout, start, end in pieces]
        rows = self._tokenizer.encode_batch(texts, allow_special=True)
        results = []
        for (layout, start, end), ids in zip(pieces, rows, strict=True):
            is_behind = start > 0
            if self._holds_marker(layout, start, end) or (is_behind and ids[0] != self.end_id):
                results.append(self._encode_guarded(layout, start, end))
            else:
                results.append(ids[is_behind:])
        return results

    def _holds_marker(self, layout: Layout, start: int, end: int) -> bool:
        """Whether the name of a special token is, wholly or partly, in a content."""
        for found in self._find_marker.finditer(layout.text, start, end):
            before = bisect(layout.contents, found.end() - 1, key=itemgetter(0))
            if before and layout.contents[before - 1][1] > found.start():
                return True
        return False

    def _encode_guarded(self, layout: Layout, start: int, end: int) -> list[int]:
        """A prompt piece of which only the template's own text may become special tokens."""
        text, ids, written = layout.text, [], start
        position = start
        if start > 0 and self._markers[self._finder.end_token].rstrip:
            position = _skip_space(text, start, end)
        contents = [content for content in layout.contents if start <= content[0] and content[1] <= end]
        for content_start, content_end in [*contents, (end, end)]:
            for found in self._find_marker.finditer(text, written, content_start):
                token = self._markers[found[0]]
                before = text[position : found.start()]
                ids += self._encode_text(before.rstrip() if token.lstrip else before, is_first=position == 0)
                ids.append(self._ids[found[0]])
                position = found.end()
                if token.rstrip:
                    position = _skip_space(text, position, end)
            written = content_end
        return ids + self._encode_text(text[position:end], is_first=position == 0)

    def _encode_text(self, text: str, is_first: bool) -> list[int]:
        is_continuation = not (is_first or self._has_prefix_behind_token)
        return self._tokenizer.encode_batch([text], is_continuation=is_continuation, text_only=self._marker_names)[0]

    def _continue(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer.encode_batch(texts, is_continuation=True, text_only=self._marker_names)

    def _insert(self, text: str) -> list[int]:
        """What a template puts between the generation prompt and an answer: its own text."""
        if text not in self._inserted:
            [self._inserted[text]] = self._tokenizer.encode_batch([text], allow_special=True, is_continuation=True)
        return self._inserted[text]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the names, the longest where several begin, as the tokenizers library does."""
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


def _skip_space(text: str, start: int, end: int) -> int:
    return end - len(text[start:end].lstrip())


def _check_characters(conversation: Conversation) -> None:
    for index, message in enumerate(conversation):
        try:
            message.content.encode()
        except UnicodeEncodeError:
            raise ConversationError(f"message {index + 1} ({message.role}) holds half a surrogate pair") from None
