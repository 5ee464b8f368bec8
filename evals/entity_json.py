"""Answers in JSON: {"疾病": ["高血压"], "药物": ["氨氯地平"]}.

Understood beside that: a list of objects with a type and a mention under their usual names, or of pairs; several
values, in code fences or amid prose; a field that stands twice; and all whole objects of a list that was cut off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from evals.entity_mentions import TRIMMED, divide, says_none
from evals.entity_text import fold
from evals.entity_types import TypeNames

_TYPES = ("类别", "类型", "实体类别", "实体类型", "type", "label", "category", "label_type", "entity_type")
_MENTIONS = ("名称", "实体", "实体名称", "mention", "entity", "name", "text", "value", "entity_name")
_WRAPPERS = ("entities", "实体", "实体列表", "结果", "result", "results", "data", "output")
_OPENING = re.compile(r"[\[{]")


class _Object(NamedTuple):
    """A JSON object with all its fields, repeated ones too."""

    pairs: list[tuple[str, Any]]

    def first(self, names: tuple[str, ...], kinds: type | tuple[type, ...]) -> Any:
        """The field of the first of some names that is of such a kind."""
        fields = {key.strip().casefold(): value for key, value in self.pairs}
        return next((fields[name] for name in names if isinstance(fields.get(name), kinds)), None)


_DECODER = json.JSONDecoder(object_pairs_hook=_Object)


def read_json(answer: str, types: TypeNames) -> list[tuple[str, str]] | None:
    """(type as it is called there, mention) of all JSON values in an answer, in order; [] if they say that there is
    nothing, None where there is no value that could say either."""
    entities: list[tuple[str, str]] = []
    says_so = False
    for value, is_alone in _values(answer):
        entities += (found := list(_entities(value, types)))
        says_so |= not found and is_alone and _is_empty(value)
    return entities if entities or says_so else None


def _values(answer: str) -> Iterator[tuple[Any, bool]]:
    """Objects and lists in an answer, and whether nothing else stands in their lines."""
    at = 0
    while found := _OPENING.search(answer, at):
        try:
            value, end = _DECODER.raw_decode(answer, found.start())
        except (ValueError, RecursionError):
            at = found.end()
            continue
        around = answer[: found.start()].rpartition("\n")[2] + answer[end:].partition("\n")[0]
        yield value, not fold(around.strip(TRIMMED))
        at = end


def _entities(value: Any, types: TypeNames) -> Iterator[tuple[str, str]]:
    if isinstance(value, _Object):
        label, mentions = value.first(_TYPES, str), value.first(_MENTIONS, (str, list))
        if label is not None and mentions is not None:
            yield from ((label, mention) for mention in _mentions(mentions))
            return
        for key, inner in value.pairs:
            if key.strip().casefold() in _WRAPPERS and not isinstance(inner, str):
                yield from _entities(inner, types)
            else:
                yield from ((key, mention) for mention in _mentions(inner))
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, list) and len(inner) == 2 and all(isinstance(one, str) for one in inner):
                yield (inner[0], inner[1]) if types.find(inner[0]) else (inner[1], inner[0])
            else:
                yield from _entities(inner, types)


def _mentions(value: Any) -> Iterator[str]:
    """Of one type. A text may hold several; those of a list are one each, as they are."""
    if isinstance(value, str):
        yield from (part for part in divide(value) if not says_none(part))
    elif isinstance(value, list) and not isinstance(value, _Object):
        for inner in value:
            mention = inner.first(_MENTIONS, str) if isinstance(inner, _Object) else inner
            if isinstance(mention, str) and fold(mention) and not (len(value) == 1 and says_none(mention)):
                yield mention.strip()


def _is_empty(value: Any) -> bool:
    """Whether there is no text in it, or only such that say so."""
    if isinstance(value, str):
        return not fold(value) or says_none(value)
    inner = [one for _, one in value.pairs] if isinstance(value, _Object) else value
    return inner is None or (isinstance(inner, list) and all(map(_is_empty, inner)))
