"""How far the entities that an answer names are the right ones.

strict     sets of (type, mention) of a text: the pairs in both are right. Mentions are compared up to `fold`.
relaxed    the same type, and one mention contains the other; one to one, as many pairs as can be.
spans      sets of (type, start, end): answers give no places, so mentions are looked for in the text (`claim`).
relaxed    spans of the same type that share a character; one to one, as many pairs as can be.

Strict and relaxed are the two of CCKS 2019's task 1 and of the i2b2 challenges (Uzuner et al. 2011): equal boundaries,
and overlapping ones. A pairing that is one to one keeps a long answer from being right about many short entities, and
the largest pairing does not depend on the order of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, TypeVar

from evals.entity_text import FoldedText, fold

T = TypeVar("T")

Pair = tuple[str, str]
"""(type, folded mention)"""
Span = tuple[str, int, int]
"""(type, start, end), the end excluded"""


class Counts(NamedTuple):
    """right: in both; said: by the answer; gold: by the annotators."""

    right: int
    said: int
    gold: int

    @property
    def f1(self) -> tuple[float, float]:
        """Numerator and denominator: 2 tp and 2 tp + fp + fn."""
        return 2.0 * self.right, float(self.said + self.gold)

    @property
    def precision(self) -> tuple[float, float]:
        return float(self.right), float(self.said)

    @property
    def recall(self) -> tuple[float, float]:
        return float(self.right), float(self.gold)


def pairs(entities: Iterable[tuple[str, str]]) -> set[Pair]:
    """Entities up to the writing of their mentions."""
    return {(kind, fold(mention)) for kind, mention in entities}


def strict(said: Collection[T], gold: Collection[T]) -> Counts:
    """Counts of two sets, of pairs or of spans."""
    return Counts(len(set(said) & set(gold)), len(said), len(gold))


def relaxed(said: Collection[Pair], gold: Collection[Pair]) -> Counts:
    """A mention is right if it contains one of the same type, or is contained in it."""
    return _matched(said, gold, lambda a, b: a[0] == b[0] and (a[1] in b[1] or b[1] in a[1]))


def relaxed_spans(said: Collection[Span], gold: Collection[Span]) -> Counts:
    """A span is right if it shares a character with one of the same type."""
    return _matched(said, gold, lambda a, b: a[0] == b[0] and a[1] < b[2] and b[1] < a[2])


def claim(said: Collection[Pair], text: FoldedText) -> set[Span]:
    """The places that an answer speaks of.

    A mention means every place where the text has it, however often the answer names it: annotators mark each of them,
    and an answer that is read as a set cannot tell them apart. Places inside a longer mention of the same answer are
    left out, as 头痛 in 偏头痛 is not meant; but where a mention has no place of its own it is a nested entity, and has
    all of them. A mention that is nowhere in the text is one span without a place, which is wrong.
    """
    places = {mention: text.find(mention) for _, mention in said}
    free = _outermost({place for found in places.values() for place in found})
    claimed: set[Span] = set()
    for at, (kind, mention) in enumerate(sorted(said)):
        own = [place for place in places[mention] if place in free]
        nowhere = [(-1 - at, -1 - at)]
        claimed.update((kind, *place) for place in own or places[mention] or nowhere)
    return claimed


def _outermost(places: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those that lie inside no other: from left to right, the longer first, those that reach beyond all before."""
    found, reach = set[tuple[int, int]](), 0
    for start, end in sorted(places, key=lambda place: (place[0], -place[1])):
        if end > reach:
            found.add((start, end))
            reach = end
    return found


def _matched(said: Collection[T], gold: Collection[T], fits: Callable[[T, T], bool]) -> Counts:
    """Counts where as many as can be of what was said are paired with gold ones that fit, each with one."""
    rows = list(gold)
    fitting = [[at for at, right in enumerate(rows) if fits(one, right)] for one in said]
    return Counts(_largest_matching(fitting), len(said), len(gold))


def _largest_matching(fitting: list[list[int]]) -> int:
    """Size of the largest one-to-one pairing of a bipartite graph, by augmenting paths (Kuhn 1955; Berge 1957).

    Args:
        fitting: of each node on the left, those on the right that it may be paired with.
    """
    left_of: dict[int, int] = {}  # what each on the right is paired with
    right_of: dict[int, int] = {}
    for start in range(len(fitting)):
        came_from: dict[int, int] = {}  # right -> left through which the search reached it
        waiting, end = [start], None
        while waiting and end is None:
            left = waiting.pop()
            for right in fitting[left]:
                if right not in came_from:
                    came_from[right] = left
                    if right not in left_of:
                        end = right
                        break
                    waiting.append(left_of[right])
        while end is not None:  # the pairs along the path change over
            left = came_from[end]
            left_of[end], right_of[left], end = left, end, right_of.get(left)
    return len(left_of)
