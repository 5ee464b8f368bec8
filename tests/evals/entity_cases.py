"""Random marked texts for the comparison with other programs: the same for the same seed, on the standard library."""

from __future__ import annotations

import random

Span = tuple[str, int, int]
LENGTH, TYPES = 24, ("A", "B", "C")


def corpora(count: int) -> list[list[tuple[list[Span], list[Span]]]]:
    """(gold, said) of eight texts each; the spans of one side do not overlap. About a third of what is said is right,
    a third is right but for a bound or the type."""
    return [[_text(random.Random(f"{corpus} {text}")) for text in range(8)] for corpus in range(count)]


def overlaps_are_single(gold: list[Span], said: list[Span]) -> bool:
    """Whether every span overlaps one of the other side at most, so that all relaxed rules agree."""
    pairs = [(a, b) for a in gold for b in said if a[1] < b[2] and b[1] < a[2]]
    return len({a for a, _ in pairs}) == len(pairs) == len({b for _, b in pairs})


def _text(rng: random.Random) -> tuple[list[Span], list[Span]]:
    gold = _spans(rng)
    said: list[Span] = []
    for kind, start, end in gold:
        changed = rng.choice(
            [(kind, start, end), (rng.choice(TYPES), start, end), (kind, start, max(start + 1, end - 1)), None]
        )
        if changed:
            said.append(changed)
    return gold, said if rng.random() < 0.8 else _spans(rng)


def _spans(rng: random.Random) -> list[Span]:
    spans, at = [], rng.randrange(4)
    while (end := at + rng.randint(1, 4)) < LENGTH:
        spans.append((rng.choice(TYPES), at, end))
        at = end + rng.randrange(4)
    return spans
