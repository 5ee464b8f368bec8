"""Records to conversations: which of the known schemas a record follows, and whether its turns can be trained on.

A schema is known by its fields; nobody has to register it. Whatever else a file holds is mapped by keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from engine.data.records import kind_of, names_in
from model.chat import Conversation, ConversationError, Message, Role

_ALIASES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "系统"),
    "user": ("user", "human", "prompter", "patient", "用户", "患者", "病人"),
    "assistant": ("assistant", "gpt", "bot", "chatgpt", "model", "ai", "doctor", "助手", "医生"),
}
ROLES: dict[str, Role] = {alias: role for role, aliases in _ALIASES.items() for alias in aliases}
# Roles, and fields of a turn, with which a model calls programs.
_TOOLS = ("tool", "tools", "tool_calls", "tool_call", "tool_response", "function", "function_call", "observation")
# A turn may also be an object with a field for each speaker.
_FIELDS_OF_TURN: dict[str, Role] = ROLES | {
    "input": "user",
    "question": "user",
    "output": "assistant",
    "answer": "assistant",
}

_TURN_LISTS = ("conversations", "conversation", "messages")
_SYSTEM = ("system", "system_prompt")
# user = assistant; fields joined by +, those with ? may be missing. The first that fits is taken.
_TABLES = (
    "instruction+input? = output",
    "instruct+input? = output",
    "instruction+context? = response",
    "prompt = output",
    "prompt = completion",
    "prompt = response",
    "prompt = answer",
    "query = response",
    "query = answer",
    "title?+ask = answer",
    "question = answer",
    "questions = answers",
    "question = response",
    "q = a",
    "问题 = 回答",
    "问题 = 答案",
    "提问 = 回答",
    "提问 = 答案",
    "患者提问 = 医生回答",
    "患者提问 = 医生回复",
    "input = output",
)
# What tells a multiple-choice question, whose answer is a letter, from an open one.
_CHOICES = ("options", "option", "choices")

KEYS = ("user", "assistant", "system", "history", "turns", "role", "content")
"""What a field can be mapped to."""
FOR_COMPARISONS = "comparisons are for tools/rm.py and tools/dpo.py"


class UnknownFieldsError(ConversationError):
    """A record's fields are those of no known schema."""


class Recognised(NamedTuple):
    """A conversation and the name of the schema it was found in."""

    messages: list[Message]
    schema: str


def parse_conversation(record: Any, keys: Mapping[str, Sequence[str]] | None = None) -> list[Message]:
    """The turns of a parsed record: [system] user assistant user assistant ..., exactly as they stand there.

    A last question without an answer stays: whoever trains leaves it out, whoever generates answers it.

    Args:
        keys: what fields mean, for schemas that are not known by themselves: "user" and "assistant" (several fields
            are joined by newlines), or "turns" (a list; with "role" and "content" if its objects have other names),
            and "system" and "history" (either may be missing in a record). Records without the fields named here are
            recognised as if there were no keys.
    Raises:
        ConversationError: why it is none.
    """
    return recognise(record, keys).messages


def recognise(record: Any, keys: Mapping[str, Sequence[str]] | None = None) -> Recognised:
    """As `parse_conversation`, with the schema's name."""
    if isinstance(record, list):
        return Recognised(_checked(list(_turns(record))), "a list of turns")
    if not isinstance(record, dict):
        raise ConversationError(f"a record is an object, this one is {kind_of(record)}")
    fields = {name.strip().casefold(): value for name, value in record.items() if isinstance(name, str)}
    if fields.get("tools"):
        raise ConversationError("it describes tools, which are not trained on")
    found = _by_keys(record, keys) if keys else None
    found = found or _by_turns(fields) or _by_table(fields)
    if found is None:
        what = "no conversation is known by these fields"
        if keys and (missing := _missing(record, keys)):
            what = f"{names_in(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        hint = "; texts are for tools/pretrain.py" if "text" in fields else ""
        hint = f"; {FOR_COMPARISONS}" if {"chosen", "rejected"} <= fields.keys() else hint
        raise UnknownFieldsError(f"{what}; this record has {names_in(record)}{hint}")
    return found


def dump(found: Recognised) -> str:
    """What was recognised as one line of JSON."""
    return json.dumps([found.schema, _plain(found.messages)], ensure_ascii=False)


def load(text: str) -> Recognised:
    """What `dump` wrote."""
    schema, messages = json.loads(text)
    return Recognised([Message(role, content) for role, content in messages], schema)


def _plain(messages: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def conversation_hash(messages: Conversation) -> bytes:
    """128 bits: 64 that stand for all messages, then 64 for the first question, whose spaces do not count."""
    whole = blake2b(json.dumps(_plain(messages)).encode(), digest_size=8).digest()
    return whole + question_hash(next(message.content for message in messages if message.role == "user"))


def question_hash(question: str) -> bytes:
    """64 bits by which questions are told apart: not by spaces, nor by the ends of their lines."""
    return blake2b("".join(question.split()).encode(), digest_size=8).digest()


# Schemas


def _by_keys(record: dict[str, Any], keys: Mapping[str, Sequence[str]]) -> Recognised | None:
    if _missing(record, keys):
        return None
    system = next((record[name] for name in keys.get("system", ()) if name in record), None)
    history = next((record[name] for name in keys.get("history", ()) if name in record), None)
    if "turns" in keys:
        names = [next(iter(keys.get(key, ())), None) for key in ("role", "content")]
        turns = [turn for field in keys["turns"] for turn in _turns(_list(record[field], field), *names)]
    else:
        turns = list(_pairs(*([record[name] for name in keys[side]] for side in ("user", "assistant"))))
    return Recognised(_checked([*_turns(_list(history, "history")), *turns], system), "--data.keys")


def _missing(record: dict[str, Any], keys: Mapping[str, Sequence[str]]) -> list[str]:
    wanted = [name for key in ("user", "assistant", "turns") for name in keys.get(key, ())]
    return [name for name in wanted if name not in record]


def _by_turns(fields: dict[str, Any]) -> Recognised | None:
    """A list of turns under one of the usual names."""
    name = next((name for name in _TURN_LISTS if isinstance(fields.get(name), list)), None)
    if name is None:
        return None
    first = next((turn for turn in fields[name] if isinstance(turn, dict)), {})
    schema = "ShareGPT" if "from" in first else "messages" if "role" in first else name
    return Recognised(_checked(list(_turns(fields[name])), _system(fields)), schema)


def _by_table(fields: dict[str, Any]) -> Recognised | None:
    """A question and an answer, each a text or a list of turns, perhaps with what was said before."""
    for table in _TABLES:
        user, _, assistant = table.partition(" = ")
        asked = user.split("+")
        if assistant not in fields or not all(name in fields for name in asked if not name.endswith("?")):
            continue
        if any(fields.get(name) for name in _CHOICES) or {"a", "b"} <= fields.keys():
            raise ConversationError(f"it is a multiple-choice question; this record has {names_in(fields)}")
        names = [name.removesuffix("?") for name in asked]
        turns = list(_pairs([fields[name] for name in names if name in fields], [fields[assistant]]))
        history = fields.get("history")
        schema = "Alpaca" if assistant == "output" and names[0] == "instruction" else table.replace("?", "")
        before = list(_turns(_list(history, "history")))
        schema += " with history" * (history is not None)
        return Recognised(_checked([*before, *turns], _system(fields)), schema)
    return None


def _system(fields: dict[str, Any]) -> Any:
    return next((fields[name] for name in _SYSTEM if fields.get(name)), None)


def _list(value: Any, name: str) -> list[Any]:
    """A field that holds turns; JSON, where a table had to put it into a cell."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ConversationError(f'"{name}" is a text, not a list of turns') from None
    if not value:
        return []
    if not isinstance(value, list):
        raise ConversationError(f'"{name}" is {kind_of(value)}, not a list of turns')
    return value


# Turns, as (role, content) before they are checked


class _Turn(NamedTuple):
    role: Role
    content: Any


def _pairs(asked: list[Any], answered: list[Any]) -> Iterator[_Turn]:
    """Questions and answers of two sides. Each is texts to be joined, or one list, whose entries alternate with the
    other's."""
    questions, answers = _side(asked), _side(answered)
    if any(isinstance(value, dict) for value in (*questions, *answers)):
        yield from _turns([*questions, *answers])
        return
    if not 0 <= len(questions) - len(answers) <= 1:
        raise ConversationError(f"{len(questions)} questions beside {len(answers)} answers do not make turns")
    for index, question in enumerate(questions):
        yield _Turn("user", question)
        if index < len(answers):
            yield _Turn("assistant", answers[index])


def _side(values: list[Any]) -> list[Any]:
    present = [value for value in values if value not in (None, "", [])]
    if len(present) == 1 and isinstance(present[0], list):
        return present[0]
    return ["\n".join(dict.fromkeys(_content(value) for value in present))]


def _turns(values: list[Any], role_key: str | None = None, content_key: str | None = None) -> Iterator[_Turn]:
    """Turns of a list of objects, of pairs, or of texts that alternate."""
    for index, value in enumerate(values):
        if isinstance(value, str):
            yield _Turn("assistant" if index % 2 else "user", value)
        elif isinstance(value, list):
            if len(value) != 2:
                raise ConversationError(f"turn {index + 1} is a list of {len(value)}, not a question and an answer")
            yield from (_Turn("user", value[0]), _Turn("assistant", value[1]))
        elif isinstance(value, dict):
            yield from _turns_of(value, index + 1, role_key, content_key)
        else:
            raise ConversationError(f"turn {index + 1} is {kind_of(value)}")


def _turns_of(turn: dict[str, Any], number: int, role_key: str | None, content_key: str | None) -> Iterator[_Turn]:
    """One turn with a role, or a turn of each speaker who has a field in the object."""
    if any(turn.get(name) for name in _TOOLS):
        raise ConversationError(f"turn {number} calls a tool, which is not trained on")
    if turn.get("weight") not in (None, 1):
        raise ConversationError(f"turn {number} has a weight; here every answer counts alike")
    role_key = role_key or next((name for name in ("from", "role") if name in turn), None)
    content_key = content_key or next((name for name in ("value", "content") if name in turn), None)
    if role_key in turn and content_key in turn:
        name = turn[role_key]
        alias = name.strip().casefold() if isinstance(name, str) else ""
        if alias in _TOOLS:
            raise ConversationError(f"turn {number} is a tool's, which is not trained on")
        if alias not in ROLES:
            raise ConversationError(f"turn {number} has the unknown role {json.dumps(name, ensure_ascii=False)}")
        yield _Turn(ROLES[alias], turn[content_key])
        return
    found = {_FIELDS_OF_TURN[name]: value for name, value in turn.items() if name in _FIELDS_OF_TURN}
    if "user" not in found:
        raise ConversationError(f"turn {number} has no role and content; it has {names_in(turn)}")
    yield from (_Turn(role, found[role]) for role in _ALIASES if found.get(role) is not None)


def _checked(turns: list[_Turn], system: Any = None) -> list[Message]:
    """Messages in the one order in which templates write them."""
    messages = [Message("system", prompt)] if (prompt := _content(system)).strip() else []
    for number, turn in enumerate(turns, 1):
        content = _content(turn.content, f"turn {number}")
        if turn.role == "system":
            if number > 1:
                raise ConversationError(f"turn {number} is a system prompt, which only the first turn can be")
            if messages:
                raise ConversationError("it has two system prompts, one among the turns and one beside them")
            messages += [Message("system", content)] if content.strip() else []
            continue
        if not content.strip():
            raise ConversationError(f"turn {number} ({turn.role}) is empty")
        before = messages[-1].role if messages else "system"
        if before == turn.role:
            raise ConversationError(f"turns {number - 1} and {number} are both the {turn.role}'s")
        if before == "system" and turn.role == "assistant":
            raise ConversationError(f"turn {number} is the assistant's; a conversation begins with the user's")
        messages.append(Message(turn.role, content))
    if not messages or messages[-1].role == "system":
        raise ConversationError("it holds no turn")
    return messages


def _content(value: Any, what: str = "its content") -> str:
    """A text, or the texts of a list of parts one behind the other."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        for part in value:
            if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
                raise ConversationError(f"{what} holds a part of type {part.get('type')!r}; only texts are trained on")
        return "".join(part["text"] for part in value)
    raise ConversationError(f"{what} is {kind_of(value)}, not a text")
