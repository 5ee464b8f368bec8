"""A script: one kind of conversation as data, and the few lines that fill it with facts.

`phrases/dialogue/<kind>.yaml` holds, for each kind, the forms that a conversation may take (which exchanges follow
one another), the exchanges themselves, and at times system prompts. Either side of an exchange is a list of parts that
are said one after the other; a part is a list of phrases, of which one is said. A phrase is a format string over named
facts, as in `samples.sheets`, and possible only when every fact it names is known; an empty phrase lets a part be left
out. A part may take in `wordings`, named lists of phrases that other texts are made of too. An exchange with a part
that cannot be said is left out whole. So what is asked and answered follows from the facts, and from the draw.

An exchange may also say what an assistant in a hurry answers in its place, `curt`: less than was asked for. Whatever
follows in the conversation is the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from model.chat import Message
from samples.draw import Draw
from samples.sheets import Facts, possible

DIRECTORY = Path(__file__).parent / "phrases" / "dialogue"
SYSTEM_RATE = 0.12  # how often a conversation begins with one of its kind's system prompts
CURT_RATE = 0.6  # how often a hurried assistant is curt where that is known to a script

Parts = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Exchange:
    user: Parts
    assistant: Parts
    curt: Parts = ()


@dataclass(frozen=True)
class Script:
    forms: Sequence[Sequence[str]]  # names of exchanges, in order
    exchanges: Mapping[str, Exchange]
    systems: Sequence[str] = field(default=())
    wordings: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def fill(self, facts: Facts, draw: Draw, hurry: Draw | None = None) -> tuple[Message, ...]:
        """One conversation: the exchanges of a form that these facts can fill, after a system prompt or none.

        Args:
            hurry: decides where the assistant is curt, without a part in any other choice; None: nowhere.
        """
        messages = [Message("system", draw.choice(self.systems))] if self.systems and draw.chance(SYSTEM_RATE) else []
        for name in draw.choice(self.forms):
            exchange = self.exchanges[name]
            if can_say(exchange.user, facts) and can_say(exchange.assistant, facts):
                messages.append(Message("user", say_all(exchange.user, facts, draw)))
                answer = say_all(exchange.assistant, facts, draw)
                if hurry and exchange.curt and hurry.chance(CURT_RATE):
                    answer = say_all(exchange.curt, facts, hurry)
                messages.append(Message("assistant", answer))
        return tuple(messages)


def load_scripts(directory: Path = DIRECTORY) -> dict[str, Script]:
    """All kinds of conversations by name."""
    return {path.stem: _script(path) for path in sorted(directory.glob("*.yaml"))}


def can_say(parts: Parts, facts: Facts) -> bool:
    return all(possible(part, facts) for part in parts)


def say_all(parts: Parts, facts: Facts, draw: Draw) -> str:
    """The parts one after the other, each in a drawn wording."""
    return "".join(draw.choice(possible(part, facts)).format_map(facts) for part in parts)


def _script(path: Path) -> Script:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    exchanges = {
        name: Exchange(**{side: [_spread(part) for part in parts] for side, parts in exchange.items()})
        for name, exchange in data.pop("exchanges").items()
    }
    return Script(exchanges=exchanges, **data)


def _spread(part: Sequence[str | Sequence[str]]) -> list[str]:
    """The phrases of a part, those of the wordings that it takes in among them."""
    return [phrase for item in part for phrase in ([item] if isinstance(item, str) else item)]
