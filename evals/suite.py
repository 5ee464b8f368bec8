"""Which tasks are asked for: one word a task on the command line, or a mapping in a recipe.

    cmmlu=data/cmmlu,shots=5,protocol=lm-eval         {name: cmmlu, path: data/cmmlu, shots: 5, protocol: lm-eval}

A builder takes what it knows from the word; whatever is left is refused with the nearest name.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, overload

from evals.task import Prompt, Task
from model.chat import Message
from model.errors import InputError

T = TypeVar("T")

Judge = Callable[[Sequence[tuple[tuple[Message, ...], str]]], list[float]]
"""The rewards of answers: (conversation up to the question, answer) each. All ranks call it together."""


@dataclass(frozen=True)
class TaskSpec:
    """One word of --tasks.

    name: which task.
    path: its files; None where none were named.
    options: everything else, as text.
    """

    name: str
    path: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set, compare=False, repr=False)

    @overload
    def take_str(self, key: str) -> str | None: ...

    @overload
    def take_str(self, key: str, default: str) -> str: ...

    def take_str(self, key: str, default: str | None = None) -> str | None:
        """A text."""
        self._known.add(key)
        return self.options.get(key, default)

    @overload
    def take_int(self, key: str, default: int, low: int = ..., high: int | None = ...) -> int: ...

    @overload
    def take_int(self, key: str, default: None, low: int = ..., high: int | None = ...) -> int | None: ...

    def take_int(self, key: str, default: int | None, low: int = 0, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`, both included. Raises InputError."""
        given = self.take_str(key)
        if given is None:
            return default
        span = f"{low} or more" if high is None else f"{low} to {high}"
        if not re.fullmatch("[+-]?[0-9]+", given):
            self.refuse(key, f"a whole number, {span}")
        value = int(given)
        if value < low or (high is not None and value > high):
            self.refuse(key, f"a whole number, {span}")
        return value

    def take_float(self, key: str, default: float, low: float = 0.0, high: float = float("inf")) -> float:
        """A number from `low` to `high`, both included. Raises InputError."""
        given = self.take_str(key)
        if given is None:
            return default
        span = f"a number, {low:g} or more" if high == float("inf") else f"a number from {low:g} to {high:g}"
        try:
            value = float(given)
        except ValueError:
            self.refuse(key, span)
        if not low <= value <= high:
            self.refuse(key, span)
        return value

    def take_choice(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of `choices`; by default the first. Raises InputError."""
        value = self.take_str(key, default or choices[0])
        if value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}")
        return value

    def take_flag(self, key: str, default: bool = False) -> bool:
        """true or false. Raises InputError."""
        value = self.take_str(key, str(default)).lower()
        if value not in ("true", "false"):
            self.refuse(key, "true or false")
        return value == "true"

    def require_path(self, what: str) -> Path:
        """The file or folder of the task.

        Args:
            what: it should be, in the words of the message: "the folder of dev/ and test/".
        Raises:
            InputError: none was named, or it is not there.
        """
        if self.path is None:
            raise InputError(f"--tasks {self.name}: it needs {what}. Write {self.name}=PATH.")
        path = Path(self.path)
        if not path.exists():
            raise InputError(f"--tasks {self.name}: {path} is not there. Give {what}.")
        return path

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise InputError: an option's value is not what it should be."""
        raise InputError(f"--tasks {self.name}: {key}={self.options[key]} is not {expected}. Correct it.")

    def check_all_taken(self) -> None:
        """Raises InputError: an option was given that nobody asked for."""
        for key in self.options:
            if key not in self._known:
                what = f"--tasks {self.name}: {key} is none of its options"
                raise InputError(f"{what}. {nearest(key, sorted(self._known))}")


@dataclass(frozen=True)
class BuildContext:
    """What a builder knows beside the word.

    prompting: whether prompts are messages or one text.
    seed: of every draw.
    limit: how many items are asked, None for all; see `draw`.
    judge: a reward model, None where none was given.
    fits: whether a prompt and so many tokens behind it go into the context; None where everything does. What does not
        fit is shortened by the respondent (oldest turns of messages, oldest tokens of a text), so a task asks this only
        where its protocol shortens in another way.
    """

    prompting: Literal["chat", "plain"] = "plain"
    seed: int = 0
    limit: int | None = None
    judge: Judge | None = None
    fits: Callable[[Prompt, int], bool] | None = None

    def draw(self, items: Sequence[T]) -> list[T]:
        """All items, or `limit` drawn ones in their order. A larger limit keeps those of a smaller one."""
        if self.limit is None or self.limit >= len(items):
            return list(items)
        order = list(range(len(items)))
        random.Random(self.seed).shuffle(order)
        return [items[place] for place in sorted(order[: self.limit])]


Builder = Callable[[TaskSpec, BuildContext], Task]


def parse_spec(given: str | Mapping[str, Any]) -> TaskSpec:
    """The task that a word or mapping asks for.

    Raises:
        InputError: it is of another form, or says something twice.
    """
    if isinstance(given, str):
        first, *rest = given.split(",")
        name, is_path, path = first.partition("=")
        pairs = [(key, value) for key, is_pair, value in (word.partition("=") for word in rest) if is_pair and key]
        if not name or len(pairs) < len(rest) or (is_path and not path):
            raise InputError(f"--tasks {given}: not of the form NAME=PATH,key=value. Correct it.")
    else:
        pairs = [(str(key), _text(value)) for key, value in given.items()]
        named = dict(pairs)
        if "name" not in named:
            raise InputError(f"--tasks {dict(given)}: no name says which task it is. Add name: cmmlu, for instance.")
        name, path = named["name"], named.get("path", "")
        pairs = [(key, value) for key, value in pairs if key not in ("name", "path")]
    options = dict(pairs)
    if len(options) < len(pairs):
        twice = next(key for key, _ in pairs if [key for key, _ in pairs].count(key) > 1)
        raise InputError(f"--tasks {name}: {twice} is given twice. Keep one.")
    return TaskSpec(name, path or None, options)


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for a name that nobody knows."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}."


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
