"""Triton's intermediate representation, read from the text that the compiler prints.

One operation stands on a line, the regions of loops and branches between braces that end and begin lines; that and
a handful of spellings are all that is relied on.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_PARTS = re.compile(f"({VALUE.pattern})")
_ARGUMENT = re.compile(r"(%[\w$.-]+): ([^,){]+)")
_OPERATION = re.compile(r'^(?:(?P<results>%.*?) = )?"?(?P<name>[A-Za-z_][\w.]*)"?(?P<text>.*)$')


@dataclass
class Block:
    """label: `^bb1`, or nothing for a region's first. arguments: (name, type)."""

    label: str = ""
    arguments: list[tuple[str, str]] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)


@dataclass
class Operation:
    """name: as in `arith.addi`. text: what stands behind it, types included. place: `file.py:12` in the source."""

    name: str
    results: list[str]
    text: str
    place: str = ""
    regions: list[list[Block]] = field(default_factory=list)

    @property
    def values(self) -> list[str]:
        """Every value named, in order; of a loop, its own counter and arguments too."""
        return VALUE.findall(self.text)

    def walk(self) -> Iterator[Operation]:
        yield self
        for region in self.regions:
            for block in region:
                for operation in block.operations:
                    yield from operation.walk()


def read(text: str) -> Operation:
    """The module, its values renamed so that no two have one name. Raises ValueError on text that is none."""
    places = _places(text)
    root = Operation("root", [], "", regions=[[Block()]])
    open_operations = [root]
    for line in text.splitlines():
        line, place = _without_locations(line)
        line = line.split("  //")[0].strip()
        if not line or line.startswith(("#", "//")):
            continue
        region = open_operations[-1].regions[-1]
        if line.startswith("^"):
            label = re.match(r"\^\w+", line)
            assert label is not None
            block = Block(label[0], _ARGUMENT.findall(line))
            if region[-1].operations or region[-1].label:
                region.append(block)
            else:
                region[-1] = block
        elif line.startswith("}"):
            closed = open_operations[-1]
            if line.endswith("{"):
                closed.regions.append([Block()])
            else:
                closed.text += line[1:]
                closed.place = places.get(place, "")
                open_operations.pop()
        else:
            operation = _operation(line, places.get(place, ""))
            region[-1].operations.append(operation)
            if line.endswith("{"):
                operation.regions.append([Block()])
                open_operations.append(operation)
    if len(open_operations) > 1 or not root.regions[0][0].operations:
        raise ValueError("not the text of a module: its braces do not match")
    _rename(root.regions[0], {}, itertools.count())
    return root.regions[0][0].operations[0]


def signature(function: Operation) -> tuple[str, list[tuple[str, str]]]:
    """Name of a `tt.func`, and its parameters with their types."""
    name = re.search(r"@([\w$.]+|\"[^\"]*\")", function.text)
    assert name is not None
    return name[1], _ARGUMENT.findall(function.text)


def _rename(region: list[Block], scope: dict[str, str], numbers: Iterator[int]) -> None:
    """The printer uses a name again once its scope has ended."""
    scope = dict(scope)
    for block in region:
        scope |= {name: f"%{next(numbers)}" for name, _ in block.arguments}
        block.arguments = [(scope[name], kind) for name, kind in block.arguments]
        for op in block.operations:
            scope |= {name: f"%{next(numbers)}" for name in op.results}
            op.results = [scope[name] for name in op.results]
    for block in region:
        for op in block.operations:
            inner = scope | {name: f"%{next(numbers)}" for name in _bound_by(op)}
            op.text = "".join(inner.get(part, part) for part in _PARTS.split(op.text))
            for nested in op.regions:
                _rename(nested, inner, numbers)


def _bound_by(op: Operation) -> list[str]:
    """Values that stand for themselves in the text of an operation, for use in its regions."""
    if op.name == "tt.func":
        return op.values
    if op.name == "scf.for":
        return [op.values[0], *op.values[4::2]]
    return op.values[::2] if op.name == "scf.while" else []


def _operation(line: str, place: str) -> Operation:
    match = _OPERATION.match(line)
    if match is None:
        raise ValueError(f"not an operation: {line}")
    results: list[str] = []
    for result in (match["results"] or "").split(", "):
        name, _, count = result.partition(":")
        results += [f"{name}#{i}" for i in range(int(count))] if count else [name] * bool(name)
    return Operation(match["name"], results, match["text"].strip(), place)


def _without_locations(line: str) -> tuple[str, str]:
    """The line without `loc(...)`, and the last of them."""
    last = ""
    while (start := line.find("loc(")) >= 0 and (start == 0 or not line[start - 1].isalnum()):
        depth, end = 0, start + 3
        while end < len(line):
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            end += 1
            if depth == 0:
                break
        last = line[start + 4 : end - 1]
        line = line[:start] + line[end:]
    return line, last


def _places(text: str) -> dict[str, str]:
    """Where each location alias points: the innermost line that is not Triton's own."""
    aliases = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    found: dict[str, str] = {}

    def resolve(alias: str) -> str:
        if alias not in found:
            found[alias] = ""
            body = aliases.get(alias, "")
            here = re.search(r'"(?:[^"]*/)?([^"/]*)":(\d+)', body)
            if here is not None:
                found[alias] = "" if "/triton/language/" in body else f"{here[1]}:{here[2]}"
            else:
                inner = (resolve(name) for name in re.findall(r"#loc\d*", body))
                found[alias] = next((place for place in inner if place), "")
        return found[alias]

    return {alias: resolve(alias) for alias in aliases}
