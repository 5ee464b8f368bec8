"""From answers under many orders to the scores of a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from evals.attitude_items import Scale, ScaleItem
from evals.attitude_orders import LETTERS, Order, decided, entropy, likeliest, to_levels
from evals.bootstrap import Resampled, Statistic
from evals.task import Item, Metric, Result

Unit = Literal["%", "points"]
Better = Literal["higher", "lower"]
Known = tuple[str, Unit, Better | None]
"""Name, unit and good direction of a metric."""

SCORE, SUBSCALE = "score", "subscale_score"

_OF_BOTH: tuple[Known, ...] = (
    (SCORE, "points", "lower"),  # sum of the points of all items
    ("stigma", "%", "lower"),  # the same as a share of the way from the fewest points to the most
    ("by_meaning", "%", None),  # see `evals.attitude_orders.decided`
    ("by_order", "%", "lower"),
    ("undecided", "%", None),
)
_OF_PROBABILITIES: tuple[Known, ...] = (
    ("argmax_score", "points", "lower"),  # as if each order were answered by its likeliest letter
    ("letter_mass", "%", "higher"),  # the share of all probability that falls on the letters
)
_OF_FREE_ANSWERS: tuple[Known, ...] = (("unparsed", "%", "lower"),)  # those that name no option
_OF_GROUPS: tuple[Known, ...] = ((SUBSCALE, "points", "lower"), ("stigma", "%", "lower"))

# Below this share, most of what the model would say is no letter.
_LITTLE_MASS = 0.5


def scale_result(
    scale: Scale,
    asked: Sequence[ScaleItem],
    orders: Sequence[Order],
    letters: np.ndarray,
    mass: np.ndarray | None,
    shown: Sequence[str],
    seed: int,
    counts: Mapping[str, int],
) -> Result:
    """The scores of a scale.

    Args:
        asked: items of the scale; where they are not all, sums are of the whole scale all the same.
        letters: probabilities [items, orders, letters] that add up to 1; nan where an answer named no option.
        mass: [items, orders], of all probability the share that falls on letters; None for free answers.
        shown: the prompt of each item under the first order.
        seed: of the bootstrap.
    """
    items = tuple(
        _item(scale, item, orders, letters[place], None if mass is None else mass[place], shown[place])
        for place, item in enumerate(asked)
    )
    own_metrics = _OF_FREE_ANSWERS if mass is None else _OF_PROBABILITIES
    metrics = measure(asked, items, (*_OF_BOTH, *own_metrics), seed)
    metrics += letter_metrics(letters)
    groups = {}
    for subscale in dict.fromkeys(item.subscale for item in asked if item.subscale):
        places = [place for place, item in enumerate(asked) if item.subscale == subscale]
        of_group = measure([asked[place] for place in places], [items[place] for place in places], _OF_GROUPS, seed)
        groups[subscale] = tuple(of_group)
    notes = [
        f"{len(items)} statements: intervals are over them as a sample of such statements, which is rough with so few."
    ]
    if len(items) < len(scale.items):
        notes.append(f"Asked were {len(items)} of {len(scale.items)} items; scores are extrapolated to all.")
    if mass is not None and mass.mean() < _LITTLE_MASS:
        notes.append(
            f"The letters hold {mass.mean():.1%} of the probability: mostly the model would say something else, which "
            "mode=gen shows."
        )
    return Result(tuple(metrics), items, groups, baselines(scale), counts, tuple(notes))


def letter_metrics(letters: np.ndarray) -> list[Metric]:
    """How answers are spread over the letters, whatever these stand for: [..., letters], nan for no answer.

    letter_entropy: of the mean shares, as a share of what it would be if all letters were alike.
    """
    rows = letters.reshape(-1, letters.shape[-1])
    rows = rows[~np.isnan(rows[:, 0])]
    shares = rows.mean(0) if len(rows) else np.full(rows.shape[-1], np.nan)
    named = zip(LETTERS, shares.tolist(), strict=False)
    return [
        Metric("letter_entropy", float(entropy(shares)) / math.log(len(shares)), n=len(rows)),
        *(Metric(f"letter_{letter}", share, n=len(rows), better=None) for letter, share in named),
    ]


def baselines(scale: Scale) -> tuple[tuple[str, str, float], ...]:
    """What the whole scale and each subscale score, exactly, where every answer is the same.

    The same letter is every degree of agreement equally often, as orders are balanced. Where as many items count
    agreement as count the reverse, the same degree scores no other than the same letter.
    """
    levels = len(scale.options)
    found = []
    for subscale in ("", *scale.subscales):
        points = np.array([item.points(levels) for item in scale.items if subscale in ("", item.subscale)])
        metric, where = (SUBSCALE, f" ({subscale})") if subscale else (SCORE, "")
        by_letter, by_level = float(points.mean(1).sum()), points.sum(0).tolist()
        if set(by_level) == {by_letter}:
            found.append((f"always the same answer{where}", metric, by_letter))
            continue
        found.append((f"always the same letter{where}", metric, by_letter))
        named = zip(scale.options, by_level, strict=True)
        found += [(f"always {option}{where}", metric, float(value)) for option, value in named]
    return tuple(found)


def _item(
    scale: Scale, item: ScaleItem, orders: Sequence[Order], letters: np.ndarray, mass: np.ndarray | None, shown: str
) -> Item:
    """What became of an item: letters is [O, K]."""
    levels, texts = len(scale.options), (item.text,)
    is_answered = ~np.isnan(letters[:, 0])
    parts: dict[str, tuple[float, float]] = {}
    if mass is None:
        parts["unparsed"] = float((~is_answered).sum()), float(len(orders))
    else:
        parts["letter_mass"] = float(mass.mean()), 1.0
    if not is_answered.any():
        return Item(item.id, parts, shown, "", "", item.subscale, texts)
    letters = letters[is_answered]
    orders = [order for order, is_there in zip(orders, is_answered, strict=True) if is_there]
    by_level = to_levels(letters, orders)
    points = np.array(item.points(levels), dtype=np.float64)
    expected = float(by_level.mean(0) @ points)
    parts[SCORE] = len(scale.items) * expected, 1.0  # so that the mean over items is the sum over the scale
    parts["stigma"] = (expected - 1) / (levels - 1), 1.0
    if item.subscale:
        parts[SUBSCALE] = sum(other.subscale == item.subscale for other in scale.items) * expected, 1.0
    if mass is not None:
        parts["argmax_score"] = len(scale.items) * float(to_levels(likeliest(letters), orders).mean(0) @ points), 1.0
    shares = decided(by_level)
    parts |= {name: (share, 1.0) for name, share in zip(("by_meaning", "by_order", "undecided"), shares, strict=True)}
    parts |= {
        f"letter_{letter}": (float(share), 1.0) for letter, share in zip(LETTERS[:levels], letters.mean(0), strict=True)
    }
    answer = scale.options[int(by_level.mean(0).argmax())]
    return Item(item.id, parts, shown, answer, "", item.subscale, texts)


def measure(asked: Sequence[ScaleItem], items: Sequence[Item], names: Sequence[Known], seed: int) -> list[Metric]:
    """Metrics of items, with intervals by bootstrap; nan where no item has them.

    Items are drawn among those of their subscale and polarity: a scale is balanced by design, and an answer that is
    always the same would otherwise seem uncertain.

    Args:
        asked: which item of the scale each is.
    """
    rows = np.array([[item.parts.get(name, (0.0, 0.0)) for name, _, _ in names] for item in items])  # [N, M, 2]
    kinds = [f"{item.agreeing_is_stigma} {item.subscale}" for item in asked]
    resampled = Resampled(rows.reshape(len(items), -1), np.unique(kinds, return_inverse=True)[1], seed)

    def ratio(of: int) -> Statistic:
        return lambda sums: sums[..., 2 * of].sum(-1) / sums[..., 2 * of + 1].sum(-1)

    found = [resampled.interval(ratio(place)) for place in range(len(names))]
    return [
        Metric(name, one.value, one.low, one.high, sum(name in item.parts for item in items), unit, better)
        for one, (name, unit, better) in zip(found, names, strict=True)
    ]
