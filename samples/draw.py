"""Random choices that are a function of a name.

Every document draws from a stream seeded by its own id, so it reads the same whichever other documents are
rendered, in whichever order, by whichever process. Only `random.Random.random` is used: it is the one method whose
sequence Python promises to keep from version to version.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of choices; the same name gives the same stream everywhere."""

    def __init__(self, name: str) -> None:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        self._uniform = random.Random(int.from_bytes(digest, "big")).random

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._uniform() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._uniform() < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self.integer(0, len(items) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        left, uniform = list(items), self._uniform
        return [left.pop(int(uniform() * count)) for count in range(len(left), 0, -1)]

    def some(self, items: Sequence[T], least: int, most: int | None = None) -> list[T]:
        """Between `least` and `most` of the items (or all, where there are fewer), in a drawn order."""
        most = len(items) if most is None else min(most, len(items))
        return self.shuffled(items)[: self.integer(min(least, most), most)]
