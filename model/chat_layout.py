"""Where contents and answers lie in a rendered conversation, learnt from rendering and never from reading it.

A template is rendered once for every sequence of roles, with stand-ins for the contents: characters of the Unicode
private-use area. What stands around them is the frame. A conversation's own rendering must then be the frame filled
with its contents, character for character, which gives every position; and it must begin with the rendering of the
prompt before each answer, so that training sees what generation will continue.

Some templates alter contents (they trim them, move or drop what a model thought, leave out what is empty), so that the
filled frame is not what they write. Then each message in turn is replaced by a stand-in among the true others, and
what changes is its content.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from model.chat_jinja import TemplateProgram
from model.errors import InputError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


Conversation = Sequence[Message]  # [system] user assistant user assistant ..


class ConversationError(ValueError):
    """One conversation that cannot be used, and why; the others can."""


class TemplateRefusal(ConversationError, InputError):
    """A conversation whose roles or contents the template cannot write: a reason to skip it among many, and to tell
    the user when it is the only one."""


class Answer(NamedTuple):
    """Positions in the text of one answer."""

    border: int
    """the generation prompt ends here, and the model goes on"""
    start: int
    """what lies between border and start is the template's own (an empty thinking block)"""
    end: int
    """the end token begins here"""


class Layout(NamedTuple):
    """A rendered conversation; spans are [start, end) of its characters, in order."""

    text: str
    contents: list[tuple[int, int]]
    answers: list[Answer]


class _Gap(NamedTuple):
    """What stands before an answer in a frame."""

    slot: int
    length: int
    """characters between the generation prompt and the content"""
    is_space: bool


class _Frame(NamedTuple):
    """What a template writes around contents."""

    literals: list[str]
    """one more than slots"""
    slots: list[int]
    """numbers of the messages whose contents stand between"""
    gaps: list[_Gap]


_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
_MAX_FRAMES = 4096


def _stand_ins(roles: Sequence[Role]) -> list[Message]:
    return [Message(role, f"\ue000{index}\ue001") for index, role in enumerate(roles)]


class LayoutFinder:
    """Finds layouts under one template.

    Args:
        program: the template.
        tokens: matches the texts that the tokenizer reads as one token.
        where: what messages call the template.
    Attributes:
        end_token: text of the token that ends an answer.
        closing: what follows an answer's content up to and with the end token.
    Raises:
        InputError: the template cannot be trained with: it writes no end token, or no prompt that an answer continues.
    """

    def __init__(self, program: TemplateProgram, tokens: re.Pattern[str], where: str) -> None:
        self._program = program
        self._where = where
        self._frames: dict[tuple[tuple[str, ...], bool], _Frame | None] = {}
        parts = _STAND_IN.split(self._render(_stand_ins(["user", "assistant"]), False))
        if parts[1::2] != ["0", "1"]:
            raise InputError(
                f"{where}: the chat template does not write a question and its answer once each, as they are. Mend it, "
                "or name another with --chat.template."
            )
        tail = parts[-1]
        found = tokens.search(tail)
        if found is None:
            raise InputError(
                f"{where}: the chat template writes no end token after an answer, so that a model would never learn to "
                "stop. Put {{ eos_token }} after each answer, or name another with --chat.template."
            )
        self.end_token, self.closing = found[0], tail[: found.end()]

    def whole(self, conversation: Conversation) -> Layout:
        """Of a conversation as it stands.

        Raises:
            ConversationError: its contents make the template write something that answers cannot be told apart in.
            InputError: so does any conversation of these roles.
        """
        return self._find(conversation, is_prompt=False)

    def prompt(self, conversation: Conversation) -> Layout:
        """Of a conversation and the header of the assistant's next turn."""
        return self._find(conversation, is_prompt=True)

    def literals(self, roles: Sequence[Role]) -> str:
        """What the template itself writes in a prompt of these roles."""
        return "\0".join(_STAND_IN.split(self._render(_stand_ins(roles), True))[::2])

    def _find(self, conversation: Conversation, is_prompt: bool) -> Layout:
        text = self._render(conversation, is_prompt)
        frame = self._frame(tuple(message.role for message in conversation), is_prompt)
        layout = None if frame is None else self._fill(frame, conversation)
        if layout is None or layout.text != text or not self._continues_prompts(layout, conversation):
            layout = self._search(text, conversation, is_prompt)
        return layout

    def _continues_prompts(self, layout: Layout, conversation: Conversation) -> bool:
        """Whether the prompt before each answer, with these contents, is what the whole begins with."""
        asked = [conversation[:index] for index, message in enumerate(conversation) if message.role == "assistant"]
        return all(
            self._render(prompt, True) == layout.text[: answer.border]
            for prompt, answer in zip(asked, layout.answers, strict=True)
        )

    def _fill(self, frame: _Frame, conversation: Conversation) -> Layout:
        pieces, contents, position = [], [], 0
        for literal, slot in zip(frame.literals, frame.slots, strict=False):
            content = conversation[slot].content
            position += len(literal)
            contents.append((position, position + len(content)))
            position += len(content)
            pieces += [literal, content]
        pieces.append(frame.literals[-1])
        space = len(self.closing) - len(self.end_token)
        answers = []
        for gap in frame.gaps:
            start, end = contents[gap.slot]
            border = start - gap.length
            answers.append(Answer(border, border if gap.is_space else start, end + space))
        return Layout("".join(pieces), contents, answers)

    def _frame(self, roles: tuple[Role, ...], is_prompt: bool) -> _Frame | None:
        """The frame of these roles; None where the template hides or alters a stand-in."""
        key = (roles, is_prompt)
        if key not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            self._frames[key] = self._build_frame(roles, is_prompt)
        return self._frames[key]

    def _build_frame(self, roles: tuple[Role, ...], is_prompt: bool) -> _Frame | None:
        messages = _stand_ins(roles)
        text = self._render(messages, is_prompt)
        parts = _STAND_IN.split(text)
        literals, slots = parts[::2], [int(index) for index in parts[1::2]]
        answers = [index for index, role in enumerate(roles) if role == "assistant"]
        counts = Counter(slots)
        if any(counts[index] != 1 for index in answers):
            return None
        places = {index: place for place, index in enumerate(slots)}
        ends = [0, *(found.end() for found in _STAND_IN.finditer(text))]  # of the slots before, then of each
        gaps = []
        for index in answers:
            place = places[index]
            prompt = self._render(messages[:index], True)
            before, after = ends[place], ends[place] + len(literals[place])
            if not text.startswith(prompt) or not before <= len(prompt) <= after:
                raise InputError(
                    f"{self._where}: the chat template writes the turns before an answer otherwise once the answer is "
                    "there, so that training would not see what generation continues. Name another with "
                    "--chat.template."
                )
            inserted = text[len(prompt) : after]
            if inserted.strip() and prompt == self._render(messages[:index], False):
                raise InputError(
                    f"{self._where}: the chat template ignores add_generation_prompt, so that generation could not "
                    f"begin an answer with {inserted!r}. Mend it, or name another with --chat.template."
                )
            if not literals[place + 1].startswith(self.closing):
                raise InputError(
                    f"{self._where}: the chat template ends an answer with {self.closing!r} in one turn and with "
                    f"{literals[place + 1][:20]!r} in another. Mend it, or name another with --chat.template."
                )
            gaps.append(_Gap(place, len(inserted), not inserted.strip()))
        return _Frame(literals, slots, gaps)

    def _search(self, text: str, conversation: Conversation, is_prompt: bool) -> Layout:
        """The layout of a rendering that follows no frame."""
        stand_in = "\ue000\ue001"
        while any(stand_in in message.content for message in conversation):
            stand_in += "\ue001"
        contents, answers, last = [], [], 0
        for index, message in enumerate(conversation):
            if message.role != "assistant" and not message.content.strip():
                continue  # nothing to find, and some templates leave it out with what stands around it
            replaced = [*conversation[:index], Message(message.role, stand_in), *conversation[index + 1 :]]
            rendered = self._render(replaced, is_prompt)
            if rendered == text:
                continue  # not shown
            left, found, right = rendered.partition(stand_in)
            start, end = len(left), len(text) - len(right)
            if not found or stand_in in right or not text.endswith(right):
                raise self._unclear(index, message)
            if message.role == "assistant":
                prompt = self._render(conversation[:index], True)
                border = len(prompt)
                if not text.startswith(prompt) or not text.startswith(self.closing, end):
                    raise self._unclear(index, message)
                # Where the frame depends on the content (thinking in it), the whole of what was written is the answer.
                start = start if text.startswith(left) and start >= border else border
                is_space = not text[border:start].strip()
                answers.append(
                    Answer(border, border if is_space else start, end + len(self.closing) - len(self.end_token))
                )
            elif not text.startswith(left):
                raise self._unclear(index, message)
            if not last <= start <= end:
                raise self._unclear(index, message)
            contents.append((start, end))
            last = end
        return Layout(text, contents, answers)

    def _render(self, conversation: Sequence[Message], is_prompt: bool) -> str:
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        return self._program.render(messages, is_prompt)

    def _unclear(self, index: int, message: Message) -> ConversationError:
        return ConversationError(
            f"message {index + 1} ({message.role}) makes the chat template write what its content cannot be found in"
        )
