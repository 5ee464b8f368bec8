"""What the reports on texts, conversations and comparisons share."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

_BAR = 40  # characters of the longest bar


def keys(hashes: np.ndarray) -> np.ndarray:
    """[N, 2] halves as one value each, in an order of their own."""
    return np.ascontiguousarray(hashes).view([("high", "<u8"), ("low", "<u8")]).ravel()


def counts(counter: Counter[str]) -> str:
    """ "3 utf-8, 1 gbk", the most common first."""
    return ", ".join(f"{count:,} {name}" for name, count in counter.most_common())


def without_numbers(reason: str) -> str:
    """A reason as the kind of reason that it is."""
    return re.sub(r"\d+", "N", reason)


def reject_reasons(path: Path) -> list[tuple[str, int]]:
    """How often each reason is given in a list of rejects, the most common first."""
    with open(path, encoding="utf-8") as lines:
        records = map(json.loads, lines)
        return Counter(without_numbers(record["reason"]) for record in records).most_common()


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
