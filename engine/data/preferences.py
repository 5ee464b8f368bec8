"""Records to comparisons: which of the known schemas a record follows, and whether anything can be learnt from it.

A schema is known by its fields; nobody has to register it. Whatever else a file holds is mapped by keys. What goes
before the answers is read as conversations are (`conversations.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from engine.data.conversations import ROLES, UnknownFieldsError, parse_conversation, recognise
from engine.data.records import CONVERSATION_FIELDS, kind_of, names_in
from model.chat import ConversationError, Message

ONLY_PREFERENCES = ("chosen", "rejected", "responses", "text", "score", "rank")
KEYS = ("user", "assistant", "system", "history", "turns", "role", "content", *ONLY_PREFERENCES)
"""What a field can be mapped to; the former are of comparisons alone."""

_PAIRS = (
    ("chosen", "rejected"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
    ("pos_resp", "neg_resp"),
)
_SCORES_OF_PAIRS = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
_LISTS = ("responses", "answers", "completions", "candidates")
_TEXTS = ("text", "content", "response", "answer", "completion", "output", "value", "回答", "答案")
_SCORES = ("score", "grade", "label", "rating", "reward", "overall_score", "评分", "分数", "标签")
_RANKS = ("rank", "ranking", "排名")
# Where the answer would stand beside a question: what goes before the answers is recognised with one.
_ANSWERS = ("output", "response", "answer", "回答", "医生回答")
_PLACEHOLDER = "…"
_LARGEST = float(np.finfo(np.float32).max)
_NO_FIELD = "\0"  # a name that no field has
_SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


Prompt: TypeAlias = tuple[Message, ...]


class Response(NamedTuple):
    """An answer; a higher grade is better."""

    text: str
    grade: float


@dataclass(frozen=True)
class Comparison:
    """A prompt, up to the question, with answers to it.

    has_margins: whether differences of grades mean anything; else grades are but an order.
    schema: the name of what the record was recognised as.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    has_margins: bool
    schema: str = ""

    @property
    def is_candidate(self) -> bool:
        """One graded answer: to be compared with those that other records give to the same prompt."""
        return len(self.responses) == 1


def parse_comparison(record: Any, keys: Mapping[str, Sequence[str]] | None = None) -> Comparison:
    """The answers of a parsed record, different from each other, not all of one grade.

    Args:
        keys: what fields mean, for schemas that are not known by themselves: what goes before the answers as for
            `parse_conversation`; and "chosen" and "rejected", or "responses" (a list; with "text" and "score" or
            "rank" if its objects have other names), or "assistant" with "score" or "rank" for records of one answer
            each. Records without the fields named here are recognised as if there were no keys.
    Raises:
        ConversationError: why nothing can be learnt from it.
    """
    found = recognise_comparison(record, keys)
    if found.is_candidate:
        raise ConversationError("it holds one answer, and nothing to compare it with")
    return found


def recognise_comparison(record: Any, keys: Mapping[str, Sequence[str]] | None = None) -> Comparison:
    """As `parse_comparison`, but one graded answer is welcome: other records may hold the others."""
    if not isinstance(record, dict):
        raise ConversationError(f"a record is an object, this one is {kind_of(record)}")
    fields = {name.strip().casefold(): value for name, value in record.items() if isinstance(name, str)}
    found = _by_keys(record, keys) if keys else None
    found = found or _by_pair(fields) or _by_list(fields) or _by_candidate(fields)
    if found is None:
        lonely = next((other for pair in _PAIRS for one, other in (pair, pair[::-1]) if one in fields), None)
        if lonely is not None:
            raise ConversationError(f'"{lonely}" is missing; this record has {names_in(record)}')
        hint = "; conversations are for tools/sft.py" if CONVERSATION_FIELDS & fields.keys() else ""
        raise ConversationError(
            f"no comparison of answers is known by these fields; this record has {names_in(record)}{hint}"
        )
    return replace(found, responses=settled(found.responses))


def settled(responses: Sequence[Response]) -> tuple[Response, ...]:
    """The answers without repetitions.

    Raises:
        ConversationError: nothing can be learnt from them.
    """
    for number, response in enumerate(responses, 1):
        if not response.text.strip():
            raise ConversationError(f"answer {number} is empty")
    if len(responses) == 1:
        return tuple(responses)
    kept: dict[str, Response] = {}
    for response in responses:
        twin = kept.setdefault(response.text.strip(), response)
        if twin.grade != response.grade:
            if len(responses) == 2:
                raise ConversationError("the better and the worse answer are the same")
            raise ConversationError(f"one answer has two grades, {twin.grade:g} and {response.grade:g}")
    if len(kept) < 2:
        raise ConversationError(f"{len(responses)} times the same answer")
    if len({response.grade for response in kept.values()}) == 1:
        raise ConversationError(f"all {len(kept)} answers have one grade")
    return tuple(kept.values())


def spread(grades: Sequence[float], most: int) -> list[int]:
    """Places of at most so many answers, ascending: the best, the worst, and others evenly between them by grade."""
    if len(grades) <= most:
        return [*range(len(grades))]
    order = sorted(range(len(grades)), key=lambda place: -grades[place])
    return sorted(order[step * (len(grades) - 1) // (most - 1)] for step in range(most))


def dump(found: Comparison) -> str:
    """A comparison as one line of JSON."""
    prompt = [(message.role, message.content) for message in found.prompt]
    return json.dumps([prompt, found.responses, found.has_margins, found.schema], ensure_ascii=False)


def load(text: str) -> Comparison:
    """What `dump` wrote."""
    prompt, responses, has_margins, schema = json.loads(text)
    messages = tuple(Message(role, content) for role, content in prompt)
    return Comparison(messages, tuple(Response(*response) for response in responses), has_margins, schema)


# Schemas


def _by_keys(record: dict[str, Any], keys: Mapping[str, Sequence[str]]) -> Comparison | None:
    named = {key: next((name for name in names if name in record), None) for key, names in keys.items()}
    needed = [key for key in ("chosen", "rejected", "responses", "assistant", "turns") if key in keys]
    if any(named[key] is None for key in needed) or any(name not in record for name in keys.get("user", ())):
        return None
    fields = {**record, _NO_FIELD: _PLACEHOLDER}
    asked = {key: keys[key] for key in ("user", "turns", "role", "content", "system", "history") if key in keys}
    if "user" in asked:
        asked["assistant"] = (_NO_FIELD,)

    def prompt() -> Prompt:
        return _asked(parse_conversation(fields, asked)) if asked else _prompt(record)

    if "chosen" in keys:
        chosen, rejected = record[named["chosen"] or ""], record[named["rejected"] or ""]
        return _pair(chosen, rejected, prompt, record, "--data.keys")
    by_rank = "rank" in keys
    grade = keys.get("rank") or keys.get("score") or (_RANKS if by_rank else _SCORES)
    if "responses" in keys:
        listed = _listed(record[named["responses"] or ""], keys.get("text") or _TEXTS, grade, by_rank)
        return Comparison(prompt(), _several(listed), not by_rank, "--data.keys")
    answer = Response(_text(record[named["assistant"] or ""], "the answer"), _grade(record, grade, by_rank))
    return Comparison(prompt(), (answer,), not by_rank, "--data.keys")


def _by_pair(fields: dict[str, Any]) -> Comparison | None:
    """A better and a worse answer: texts, messages, or whole conversations that differ in their last message."""
    names = next((names for names in _PAIRS if all(name in fields for name in names)), None)
    if names is None:
        output = fields.get("output")
        if isinstance(output, list) and len(output) == 2 and "instruction" in fields:
            rest = {name: value for name, value in fields.items() if name != "output"}
            return _pair(output[0], output[1], lambda: _prompt(rest), rest, "output: better, worse")
        return None
    rest = {name: value for name, value in fields.items() if name not in names}
    scores = next((names for names in _SCORES_OF_PAIRS if all(is_number(fields.get(name)) for name in names)), None)
    found = _pair(fields[names[0]], fields[names[1]], lambda: _prompt(rest), rest, " > ".join(names))
    if scores is None:
        return found
    better, worse = (_number(fields[name], by_rank=False) for name in scores)
    if better < worse:
        raise ConversationError(f'"{scores[0]}" is {better:g}, below "{scores[1]}", {worse:g}')
    responses = (found.responses[0]._replace(grade=better), found.responses[1]._replace(grade=worse))
    return replace(found, responses=responses, has_margins=True)


def _by_list(fields: dict[str, Any]) -> Comparison | None:
    """Answers with grades, as objects, or as two lists side by side."""
    name = next((name for name in _LISTS if isinstance(fields.get(name), list)), None)
    if name is None:
        return None
    answers, rest = fields[name], {field: value for field, value in fields.items() if field != name}
    if answers and all(isinstance(answer, str) for answer in answers):
        beside = [(field, field in _RANKS) for field in (*_SCORES, *_RANKS)]
        found = next(((f, r) for g, r in beside for f in (g, f"{g}s") if isinstance(fields.get(f), list)), None)
        if found is None:
            return None
        grades, by_rank = fields[found[0]], found[1]
        if len(grades) != len(answers):
            raise ConversationError(f'{len(answers)} answers beside {len(grades)} grades in "{found[0]}"')
        side_by_side = zip(answers, grades, strict=True)
        paired = [Response(text, _number(grade, by_rank)) for text, grade in side_by_side]
        return Comparison(_prompt(rest), _several(paired), not by_rank, f"{name} beside {found[0]}")
    first = next((answer for answer in answers if isinstance(answer, dict)), {})
    by_rank = not any(score in first for score in _SCORES) and any(rank in first for rank in _RANKS)
    listed = _listed(answers, _TEXTS, _RANKS if by_rank else _SCORES, by_rank)
    return Comparison(_prompt(rest), _several(listed), not by_rank, f"{name} with {'ranks' if by_rank else 'grades'}")


def _by_candidate(fields: dict[str, Any]) -> Comparison | None:
    """A conversation with a grade: one answer of several, which other records hold."""
    by_rank = not any(name in fields for name in _SCORES)
    grades = _RANKS if by_rank else _SCORES
    name = next((name for name in grades if name in fields), None)
    if name is None:
        return None
    messages, schema = recognise({field: value for field, value in fields.items() if field != name}, None)
    if messages[-1].role != "assistant":
        raise ConversationError("it holds no answer")
    answer = Response(_unquoted(messages[-1].content), _number(fields[name], by_rank))
    prompt = tuple(Message(message.role, _unquoted(message.content)) for message in messages[:-1])
    return Comparison(prompt, (answer,), not by_rank, f"{schema} by {name}")


# Answers


def _pair(
    chosen: Any, rejected: Any, prompt: Callable[[], Prompt], fields: Mapping[str, Any], schema: str
) -> Comparison:
    """Two answers, better and worse.

    Args:
        prompt: gives what goes before them, where they are no whole conversations.
        fields: the others of the record.
    """
    if _is_whole(chosen) and _is_whole(rejected):
        (*asked, better), (*other, worse) = _conversation(chosen, fields), _conversation(rejected, fields)
        if asked != other:
            raise ConversationError("the two conversations differ before their last answers")
        if better.role != "assistant" or worse.role != "assistant":
            raise ConversationError("a conversation does not end with an answer")
        texts, schema = (better.content, worse.content), f"{schema} as conversations"
    else:
        texts, asked = (_text(chosen, "the better answer"), _text(rejected, "the worse answer")), [*prompt()]
    return Comparison(tuple(asked), (Response(texts[0], 1.0), Response(texts[1], 0.0)), False, schema)


def _is_whole(value: Any) -> bool:
    """Whether this is a conversation and no answer by itself."""
    if isinstance(value, str):
        return value.lstrip().startswith("Human:")
    return isinstance(value, list) and len(value) > 1


def _conversation(value: Any, fields: Mapping[str, Any]) -> list[Message]:
    if isinstance(value, str):
        _, *parts = _SPEAKERS.split(value)
        value = [{"role": role, "content": text.strip()} for role, text in zip(parts[::2], parts[1::2], strict=True)]
    return recognise({"messages": value, **_system(fields)}).messages


def _listed(values: Any, texts: Sequence[str], grades: Sequence[str], by_rank: bool) -> Iterator[Response]:
    """Answers of a list of objects."""
    if not isinstance(values, list):
        raise ConversationError(f"its answers are {kind_of(values)}, not a list")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ConversationError(f"answer {number} is {kind_of(value)} without a grade")
        text = next((name for name in texts if name in value), None)
        if text is None:
            raise ConversationError(f"answer {number} has no text; it has {names_in(value)}")
        yield Response(_text(value[text], f"answer {number}"), _grade(value, grades, by_rank, number))


def _several(responses: Iterable[Response]) -> tuple[Response, ...]:
    listed = tuple(responses)
    if len(listed) < 2:
        raise ConversationError(f"its list holds {'one answer' if listed else 'no answer'}; a comparison takes two")
    return listed


def _grade(fields: Mapping[str, Any], names: Sequence[str], by_rank: bool, number: int | None = None) -> float:
    name = next((name for name in names if name in fields), None)
    if name is None:
        raise ConversationError(f"answer {number or ''} has no grade; it has {names_in(fields)}".replace("  ", " "))
    return _number(fields[name], by_rank)


def _number(value: Any, by_rank: bool) -> float:
    """A grade in fp32, as it is stored; of ranks the first is the best."""
    if not is_number(value):
        raise ConversationError(f"a grade is a number, not {value!r:.40}")
    grade = float(np.float32(value))
    return -grade if by_rank else grade


def is_number(value: Any) -> bool:
    try:
        return isinstance(value, (str, int, float)) and abs(float(value)) <= _LARGEST
    except (ValueError, OverflowError):
        return False


def _text(value: Any, what: str) -> str:
    """An answer: a text, a message, or a list of one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        role = value.get("role", value.get("from", "assistant"))
        if not isinstance(role, str) or ROLES.get(role.strip().casefold()) != "assistant":
            raise ConversationError(f"{what} is the message of {role!r}")
        value = value.get("content", value.get("value"))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConversationError(f"{what} is {kind_of(value)}, not a text")
    return value


def _unquoted(text: str) -> str:
    """A field written as CSV's are and read as plain text: quotes around it, and every one inside it double."""
    inner = text[1:-1]
    is_quoted = len(text) > 3 and text[0] == text[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else text


# What goes before the answers


def _prompt(fields: Mapping[str, Any]) -> Prompt:
    """
    Raises:
        ConversationError: there is no question.
    """
    turns = fields.get("prompt")
    if isinstance(turns, list):
        return _asked(recognise({"messages": turns, **_system(fields)}).messages)
    try:
        return _asked(recognise({**fields, **dict.fromkeys(_ANSWERS, _PLACEHOLDER)}).messages)
    except UnknownFieldsError:
        raise UnknownFieldsError(
            f"no question is known by these fields; beside its answers this record has {names_in(fields)}"
        ) from None


def _system(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in ("system", "system_prompt") if name in fields}


def _asked(messages: list[Message]) -> Prompt:
    if messages[-1] == Message("assistant", _PLACEHOLDER):
        messages = messages[:-1]
    if messages[-1].role != "user":
        raise ConversationError("no question stands before the answers")
    return tuple(messages)
