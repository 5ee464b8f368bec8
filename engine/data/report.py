"""What the reports on texts, conversations and comparisons share."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BAR = 40  # characters of the longest bar
_NUMBER = re.compile(r"0x[0-9a-f]+|(?<![A-Za-z0-9_])(?<![A-Za-z]-)[0-9]+")


def keys(hashes: np.ndarray) -> np.ndarray:
    """[N, 2] halves as one value each, in an order of their own."""
    return np.ascontiguousarray(hashes).view([("high", "<u8"), ("low", "<u8")]).ravel()


def counts(counter: Counter[str]) -> str:
    """ "3 utf-8, 1 gbk", the most common first."""
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common())


def without_numbers(reason: str) -> str:
    """The kind of reason that a reason is: what reasons are counted by. Names, such as utf-8, keep their numbers."""
    return _NUMBER.sub("N", reason)


def reject_reasons(path: Path) -> list[tuple[str, int]]:
    """How often each kind of reason is given in a list of rejects, the most common first; as it is given first, with
    the file and line of that."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for record in _rejects(path):
        kind = without_numbers(record["reason"])
        found[kind] += 1
        line = "" if record["line"] is None else f":{record['line']}"
        first.setdefault(kind, f"{record['reason']} (first {record['file']}{line})")
    return [(first[kind], count) for kind, count in found.most_common()]


def count_too_long(path: Path, context: int) -> int:
    """Records in a list of rejects whose reason is the context."""
    return sum(f"context of {context}" in record["reason"] for record in _rejects(path))


def what_else(path: Path, context: int, option: str) -> str:
    """What to do where nothing is left of the files that an option names; path: of the list of rejects."""
    if count_too_long(path, context):
        return "Raise --train.context, on a --model of a longer one if need be."
    return f"Give {option} other files."


def _rejects(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def unless_zero(count: int, what: str) -> str:
    """A clause for the end of a line."""
    return f", {count:,} {what}" if count else ""


def by_size(numbers: Counter[int], most: int, what: str) -> str:
    """ " (1: 600, 2: 30, 8+: 2 by answers a conversation)", all from `most` on together; "" where there are none."""
    few = [f"{size}: {numbers[size]:,}" for size in sorted(numbers) if size < most]
    many = sum(count for size, count in numbers.items() if size >= most)
    each = ", ".join([*few, *([f"{most}+: {many:,}"] if many else [])])
    return f" ({each} by {what})" if each else ""


def histogram(lengths: np.ndarray, unit: str) -> list[str]:
    """A bar for each doubling of the length."""
    middle, high = np.percentile(lengths, [50, 95])
    lines = [
        f"Length in {unit}: median {middle:,.0f}, mean {lengths.mean():,.0f}, 95% below {high:,.0f}, "
        f"longest {lengths.max():,}"
    ]
    numbers = np.bincount(np.log2(np.maximum(lengths, 1)).astype(int))
    for power in range(int(np.flatnonzero(numbers)[0]), len(numbers)):
        bar = "█" * round(_BAR * numbers[power] / numbers.max())
        lines.append(f"{2**power:>11,} –{2 ** (power + 1) - 1:>11,} {numbers[power]:>11,} {bar}")
    return lines
