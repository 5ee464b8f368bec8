"""A conversation at a terminal, or through a pipe: lines in, answers out while they are written.

Answers go to stdout and nothing else does, so that a pipe reads answers alone; what the program has to say goes to
stderr. A line that begins with / is a command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.chatting import Chat, SamplingConfig
from engine.config import parse
from engine.data.conversations import parse_conversation
from model.chat import ConversationError, Message
from model.errors import InputError

PROMPT = "> "
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
_UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte


def talk(chat: Chat) -> int:
    """Hold a conversation on this process's stdin, stdout and stderr until one side leaves.

    Returns:
        the exit code: 0, 130 after Ctrl-C, or 141 when nobody reads the answers any more.
    """
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    model = chat.model
    _say(
        f"Template {model.template.name}, context {model.generator.context:,} tokens, "
        f"{str(model.generator.dtype).removeprefix('torch.')} on {model.generator.device}. /help lists the commands."
    )
    conversation = _Talk(chat)
    try:
        for line in _lines():
            conversation.take(line.strip())
            if conversation.is_over:
                break
    except KeyboardInterrupt:
        _say("")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # who read the answers has left, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    return 0


class _Talk:
    """What happens on each line."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._has_said_dropped = False
        self._commands: dict[str, tuple[str, Callable[[str], Any]]] = {
            "/reset": ("forget what was said; the system message stays", self._reset),
            "/system": ("TEXT  set the system message; without a text, remove it", self._system),
            "/save": ("FILE  write the conversation as one line of JSON, which tools/sft.py reads too", self._save),
            "/load": ("FILE  go on with a conversation that was saved, or the first one of a file", self._load),
            "/set": ("NAME=VALUE ...  change how answers are drawn; without a name, show it", self._set),
            "/help": ("this list", self._help),
            "/quit": ("leave; so does the end of the input, or Ctrl-C twice", self._quit),
        }
        self.is_over = False

    def take(self, line: str) -> None:
        """Do what a line asks for."""
        try:
            if _UNDECODED.search(line):
                raise InputError(
                    "This line is not UTF-8, and is left out. Set the terminal to UTF-8, "
                    "or convert the text: iconv -f gb18030 -t utf-8."
                )
            if line.startswith("/"):
                self._command(*line.partition(" ")[::2])
            elif line:
                self._answer(line)
        except InputError as error:  # the conversation goes on
            _say(error)

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            close = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"Did you mean {close[0]}?" if close else "/help lists them."
            raise InputError(f"{name} is not a command. {hint}")
        self._commands[name][1](argument.strip())

    def _answer(self, question: str) -> None:
        began, count, reason = time.monotonic(), 0, None
        try:
            events = self._chat.ask(question)
            with _noted_interrupts() as is_interrupted:
                for event in events:
                    print(event.text, end="", flush=True)
                    count, reason = count + 1, event.end_reason
                    if is_interrupted():
                        break
                events.close()  # type: ignore[attr-defined]
        except ConversationError as error:
            raise InputError(f"This cannot be answered: {error}. Ask in fewer words, or /reset.") from None
        print(flush=True)
        self._report(count, reason, time.monotonic() - began)

    def _report(self, count: int, reason: str | None, seconds: float) -> None:
        if self._chat.dropped_turns and not self._has_said_dropped:
            _say("The context is full: from here on the oldest turns are left out. /reset begins anew.")
            self._has_said_dropped = True
        end = {"stop": "", "length": ", cut at max_new_tokens or the end of the context", None: ", stopped"}[reason]
        _say(f"[{count} tokens, {count / max(seconds, 1e-9):.1f} tokens/s{end}]")

    def _reset(self, _: str) -> None:
        self._chat.turns, self._has_said_dropped = [], False
        _say("What was said is forgotten.")

    def _system(self, text: str) -> None:
        self._chat.system = text
        _say(f"The system message is {'set' if text else 'removed'}.")

    def _save(self, name: str) -> None:
        if not self._chat.turns:
            raise InputError("Nothing was said yet that could be saved. Ask first.")
        messages = [{"role": message.role, "content": message.content} for message in self._chat.messages]
        try:
            with open(_named(name, "/save"), "x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise InputError(f"{name} exists, and nothing is overwritten. Choose another name.") from None
        except (OSError, ValueError) as error:  # ValueError: a name with a null character
            reason = getattr(error, "strerror", error)
            raise InputError(f"{name}: cannot be written ({reason}). Choose another place.") from None
        _say(f"{len(messages)} messages in {name}.")

    def _load(self, name: str) -> None:
        try:
            text = Path(_named(name, "/load")).read_text(encoding="utf-8")
            messages = parse_conversation(_first_value(text))
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror}). Check the path.") from None
        except (ValueError, RecursionError) as error:  # RecursionError: JSON of a thousand brackets
            raise InputError(f"{name}: no conversation ({error}). Give a file that /save wrote.") from None
        system = [message.content for message in messages if message.role == "system"]
        turns: list[Message] = [message for message in messages if message.role != "system"]
        if turns[-1].role == "user":
            _say(f"Its last question has no answer and is left out: {turns.pop().content}")
        self._chat.system, self._chat.turns, self._has_said_dropped = "".join(system), turns, False
        _say(f"{len(turns)} messages from {name}.")

    def _set(self, argument: str) -> None:
        sampling = self._chat.sampling
        names = [word.partition("=")[0] for word in argument.split()]
        if unknown := [name for name in names if name not in vars(sampling)]:
            raise InputError(f"/set {unknown[0]}: there is no such option. There are {', '.join(vars(sampling))}.")
        if bare := [word for word in argument.split() if "=" not in word]:
            raise InputError(f"/set {bare[0]} needs a value, as in /set {bare[0]}={getattr(sampling, bare[0])}.")
        given = parse(SamplingConfig, [f"--{word}" for word in argument.split()], "/set")
        changed = dataclasses.replace(sampling, **{name: getattr(given, name) for name in names})
        changed.options(())  # refuses what is out of range
        self._chat.sampling = changed
        _say(" ".join(f"{name}={value}" for name, value in vars(changed).items()))

    def _quit(self, _: str) -> None:
        self.is_over = True

    def _help(self, _: str) -> None:
        for name, (text, _command) in self._commands.items():
            _say(f"{name:<8} {text}")


def _lines() -> Iterator[str]:
    """Lines of stdin; on a terminal with a prompt, and with what was typed before on the arrow keys."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # there is none on some systems
        import readline  # noqa: F401  input() uses it from now on
    with contextlib.suppress(EOFError):
        while True:
            if sys.stdout.isatty():
                yield input(PROMPT)
            else:
                print(PROMPT, end="", file=sys.stderr, flush=True)
                yield input()


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, so that it breaks no computation in the middle; a second one is raised."""
    interrupts: list[int] = []

    def note(number: int, frame: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(number)

    earlier = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, earlier)


def _first_value(text: str) -> Any:
    """A file's JSON value, or that of its first line; the first entry of a list of conversations."""
    try:
        value = json.loads(text)
    except ValueError:
        value = json.loads(text.lstrip().partition("\n")[0])
    is_list_of_conversations = (
        isinstance(value, list) and value and isinstance(value[0], dict) and "role" not in value[0]
    )
    return value[0] if is_list_of_conversations else value


def _named(name: str, command: str) -> str:
    if not name:
        raise InputError(f"{command} needs a file's name, as in {command} chat.json.")
    return name


def _say(message: object) -> None:
    print(message, file=sys.stderr, flush=True)
