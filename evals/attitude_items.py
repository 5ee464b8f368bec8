"""Files of items: the statements that a scale asks about, which users bring themselves.

A scale with a built-in key needs texts alone:

    {"items": [{"id": 1, "text": "…"}, …]}      or      ["…", "…", …]      in the order of the scale

What such a file says besides of subscales, polarity and options is compared with the key. A scale of one's own says
all of it:

    {"scale": "…", "options_low_to_high": ["…", …], "items": [{"id": …, "text": "…", "subscale": "…",
     "agreeing_is_stigma": true}, …]}           "subscale" in every item or in none
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.encodings import Stream, detect_encoding
from engine.data.records import kind_of, names_in
from engine.files import digest_files
from evals.attitude_key import Key
from model.errors import InputError

# Letters for options are A, B, C, …; and an order of options is written as one digit each.
FEWEST_OPTIONS, MOST_OPTIONS = 2, 9


@dataclass(frozen=True)
class ScaleItem:
    """A statement, and whether it is stigma to agree with it. subscale: "" where the scale has none."""

    id: str
    text: str
    subscale: str
    agreeing_is_stigma: bool

    def points(self, levels: int) -> list[int]:
        """What each degree of agreement counts, from the least to the most: 1 to `levels`, more being more stigma."""
        rising = list(range(1, levels + 1))
        return rising if self.agreeing_is_stigma else rising[::-1]


@dataclass(frozen=True)
class Scale:
    """A questionnaire.

    options: degrees of agreement, from the least to the most.
    fingerprint: of the file, 128 bits in hex.
    """

    name: str
    options: tuple[str, ...]
    items: tuple[ScaleItem, ...]
    fingerprint: str

    @property
    def subscales(self) -> tuple[str, ...]:
        """Their names in order of appearance; none where there is one scale."""
        return tuple(dict.fromkeys(item.subscale for item in self.items if item.subscale))


def read_scale(path: str, key: Key | None = None) -> Scale:
    """Read an items file.

    Args:
        key: of the scale that it must be; None for one that brings its own.
    Raises:
        InputError: it cannot be read, is not whole, or contradicts the key.
    """
    value = _parse(path)
    found = {"items": value} if isinstance(value, list) else value
    if not isinstance(found, dict) or not isinstance(found.get("items"), list):
        held = f'{names_in(found)} and no list "items"' if isinstance(found, dict) else kind_of(found)
        raise InputError(f'{path}: it holds {held}. Write {{"items": [{{"id": 1, "text": "…"}}, …]}}.')
    options = _options(path, found, key)
    items = _keyed(path, found["items"], key) if key else _own(path, found["items"])
    name = key.name if key else str(found.get("scale") or "attitudes")
    return Scale(name, options, items, digest_files(Path(path)))


def _parse(path: str) -> Any:
    with Stream(path, "", detect_encoding(path, "")) as stream:
        content = stream.read()
    try:
        return json.loads(content.decode(stream.codec))
    except (ValueError, RecursionError) as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}{where}: not readable as JSON ({error}). Mend the file.") from None


def _options(path: str, found: dict[str, Any], key: Key | None) -> tuple[str, ...]:
    options: Any = found.get("options_low_to_high", key.options if key else None)
    fewest, most = (len(key.options),) * 2 if key else (FEWEST_OPTIONS, MOST_OPTIONS)
    advice = f"List {fewest if fewest == most else f'{fewest} to {most}'} degrees of agreement, the least first."
    is_list = isinstance(options, (list, tuple))
    if not is_list or not all(isinstance(option, str) and option.strip() for option in options):
        raise InputError(f'{path}: "options_low_to_high" is no list of texts. {advice}')
    points = found.get("points", len(options))
    if not fewest <= len(options) <= most or points != len(options):
        said = f'; "points" says {points}' if points != len(options) else ""
        raise InputError(f'{path}: "options_low_to_high" lists {len(options)}{said}. {advice}')
    if len(set(options)) < len(options):
        twice = next(option for option in options if list(options).count(option) > 1)
        raise InputError(f"{path}: two options say {twice}. Word each degree of agreement differently.")
    return tuple(options)


def _keyed(path: str, values: Sequence[Any], key: Key) -> tuple[ScaleItem, ...]:
    """Items of a scale with a key, in its order."""
    count = len(key.subscales)
    numbers = {str(number): number for number in range(1, count + 1)}
    if all(isinstance(value, str) for value in values):
        if len(values) != count:
            raise InputError(f"{path}: {len(values)} items, {key.name} has {count}. List all of them, in its order.")
        values = [{"id": number, "text": text} for number, text in enumerate(values, 1)]
    texts: dict[int, str] = {}
    for id, value in _numbered(path, values):
        if id not in numbers:
            raise InputError(f"{path}: there is no item {id} in {key.name}. Number its items from 1 to {count}.")
        number = numbers[id]
        _compare(path, id, value, "subscale", key.subscales[number - 1], key)
        _compare(path, id, value, "agreeing_is_stigma", key.agreeing_is_stigma[number - 1], key)
        texts[number] = value["text"]
    if missing := [id for id, number in numbers.items() if number not in texts]:
        named = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        found = f"{len(texts)} of the {count} items of {key.name}"
        raise InputError(f"{path}: it holds {found}, not {named}. Add what is missing.")
    return tuple(
        ScaleItem(str(number), texts[number], subscale, is_stigma)
        for number, (subscale, is_stigma) in enumerate(zip(key.subscales, key.agreeing_is_stigma, strict=True), 1)
    )


def _compare(path: str, id: str, value: dict[str, Any], name: str, wanted: str | bool, key: Key) -> None:
    """See that a file that says what the key says too says the same."""
    said = value.get(name, wanted)
    if isinstance(said, str):
        said = said.strip().lower().replace(" ", "_").replace("-", "_")
    if type(said) is not type(wanted) or said != wanted:
        raise InputError(
            f'{path}: item {id} has "{name}": {json.dumps(value[name], ensure_ascii=False)}, the key of {key.name} '
            f"says {json.dumps(wanted)}. See that the item is the one with this number, and leave {name} out."
        )


def _own(path: str, values: Sequence[Any]) -> tuple[ScaleItem, ...]:
    """Items of a scale that brings its key."""
    items = []
    for id, value in _numbered(path, values):
        subscale, is_stigma = value.get("subscale", ""), value.get("agreeing_is_stigma")
        if not isinstance(is_stigma, bool):
            raise InputError(f'{path}: item {id} does not say "agreeing_is_stigma". Write true or false there.')
        if not isinstance(subscale, str):
            raise InputError(f'{path}: "subscale" of item {id} is {kind_of(subscale)}. Write its name there.')
        items.append(ScaleItem(id, value["text"], subscale, is_stigma))
    if not items:
        raise InputError(f"{path}: there is no item in it. Give a file that holds the scale's statements.")
    without = next((item.id for item in items if not item.subscale), None)
    if without and any(item.subscale for item in items):
        raise InputError(f'{path}: item {without} has no "subscale", others have. Name one in each, or in none.')
    return tuple(items)


def _numbered(path: str, values: Sequence[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and items: each an object with an id of its own and a text."""
    seen: set[str] = set()
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise InputError(f'{path}: item {number} is {kind_of(value)}. Write {{"id": {number}, "text": "…"}}.')
        id = value.get("id")
        if isinstance(id, bool) or not isinstance(id, (int, str)) or not str(id).strip():
            raise InputError(f'{path}: item {number} has no "id". Give each item a number or a name.')
        if str(id) in seen:
            raise InputError(f"{path}: two items have the id {id}. Give each its own.")
        if not isinstance(value.get("text"), str) or not value["text"].strip():
            raise InputError(f'{path}: item {id} has no "text". Write its statement there.')
        seen.add(str(id))
        yield str(id), value
