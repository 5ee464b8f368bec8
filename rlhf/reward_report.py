"""How good a reward model is on comparisons it was not trained on, and whether it is more than a ruler.

Counted are pairs of answers to one prompt with different grades. Raters prefer longer answers more often than not, so
"the longer one wins" is the rule to beat: PPO on a model that learnt no more writes ever longer (Singhal et al. 2023).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import write_durably
from engine.intervals import Share, clustered_difference, clustered_share

# Length of the better answer, as a multiple of the worse one's.
_RATIOS = (0.5, 0.8, 1.25, 2.0)
_RATIO_NAMES = ("less than half as long", "shorter", "about as long", "longer", "more than twice as long")
# Probability that the model gives to the answer it prefers.
_CERTAINTIES = (0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Judged:
    """Scored answers, those of a prompt one behind the other; each array has one entry an answer.

    scores: raw, as the loss saw them. std: what a unit of margin is.
    lengths: tokens of the answers.
    """

    scores: np.ndarray
    grades: np.ndarray
    groups: np.ndarray
    lengths: np.ndarray
    std: float = 1.0

    @classmethod
    def empty(cls) -> Judged:
        return cls(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def best(self) -> np.ndarray:
        """Of each prompt the answer with the highest grade, the first of equals: int64, one a prompt."""
        order = np.lexsort((-self.grades, self.groups))
        return order[np.unique(self.groups[order], return_index=True)[1]]


def measure(judged: Judged) -> dict[str, Any]:
    """All figures of the report, for report.json. A share is [value, low, high], with 95 % confidence."""
    better, worse, tied = _pairs(judged.groups, judged.grades)
    prompts, margins = judged.groups[better], judged.scores[better] - judged.scores[worse]
    is_right, gap = _wins(margins), judged.lengths[better] - judged.lengths[worse]
    by_length = _wins(gap)
    figures = {
        "prompts": len(np.unique(prompts)),
        "pairs": len(better),
        "tied_pairs": tied,
        "accuracy": clustered_share(is_right, prompts),
        "longer_wins": clustered_share(by_length, prompts),
        "accuracy_above_longer_wins": clustered_difference(is_right - by_length, prompts),
        "margin": float((margins / judged.std).mean()) if len(margins) else None,
    }

    def row(name: str, chosen: np.ndarray) -> dict[str, Any]:
        return {
            "name": name,
            "pairs": int(chosen.sum()),
            "accuracy": clustered_share(is_right[chosen], prompts[chosen]),
            "margin": float((margins[chosen] / judged.std).mean()) if chosen.any() else None,
        }

    figures["by_better"] = [
        row("the shorter one is better", gap < 0),
        row("equally long", gap == 0),
        row("the longer one is better", gap > 0),
    ]
    bucket = np.digitize(judged.lengths[better] / np.maximum(judged.lengths[worse], 1), _RATIOS)
    figures["by_length"] = [row(name, bucket == number) for number, name in enumerate(_RATIO_NAMES)]
    differences = judged.grades[better] - judged.grades[worse]
    bucket = (
        np.searchsorted(np.unique(np.quantile(differences, (0.25, 0.5, 0.75))), differences) if len(better) else better
    )
    figures["by_grade"] = [row(_span(differences[bucket == number]), bucket == number) for number in np.unique(bucket)]
    figures["calibration"] = _calibration(np.abs(margins), np.where(margins == 0, 0.5, is_right))
    return figures


def _pairs(groups: np.ndarray, grades: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Index of the better and of the worse answer of every pair, and the number of pairs that are tied."""
    better, worse, tied = [], [], 0
    for lag in range(1, int(np.bincount(groups).max()) if len(groups) else 0):
        first = np.flatnonzero(groups[lag:] == groups[:-lag])
        rise = grades[first + lag] - grades[first]
        better += [first[rise < 0], first[rise > 0] + lag]
        worse += [first[rise < 0] + lag, first[rise > 0]]
        tied += int((rise == 0).sum())
    none = [np.zeros(0, np.int64)]
    return np.concatenate(better or none), np.concatenate(worse or none), tied


def _wins(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 1/2 where there is none."""
    return (np.sign(differences) + 1) / 2


def _calibration(margins: np.ndarray, is_right: np.ndarray) -> dict[str, Any]:
    """What the model promises beside what it keeps: P = sigmoid(margin) that the answer it prefers is the better one.

    The error is the mean distance of the two over pairs, in bins of P (Guo et al. 2017, eq. 3).
    """
    promised = 1 / (1 + np.exp(-margins))
    bins = np.digitize(promised, _CERTAINTIES)
    rows, error = [], 0.0
    for number in np.unique(bins):
        chosen = bins == number
        predicted, observed = float(promised[chosen].mean()), float(is_right[chosen].mean())
        error += chosen.mean() * abs(predicted - observed)
        low, high = (0.5, *_CERTAINTIES, 1.0)[number : number + 2]
        rows.append({"from": low, "to": high, "pairs": int(chosen.sum()), "predicted": predicted, "observed": observed})
    return {"error": float(error), "bins": rows}


def _span(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def summary(figures: dict[str, Any]) -> str:
    """What matters, in a few lines for stdout."""
    if not figures["pairs"]:
        return "No held-out pairs, so nobody knows how good the model is. Raise --eval.fraction or give --eval.data."
    shorter = figures["by_better"][0]
    return (
        f"held-out accuracy {figures['accuracy']} on {figures['pairs']:,} pairs of {figures['prompts']:,} prompts "
        f"(95 % interval over prompts)\n"
        f'"the longer one wins" {figures["longer_wins"]}: {verdict(figures)}\n'
        f"where the shorter one is better {shorter['accuracy']} of {shorter['pairs']:,} pairs; "
        f"mean margin {figures['margin']:.2f}; calibration error {figures['calibration']['error']:.1%}"
    )


def verdict(figures: dict[str, Any]) -> str:
    """Whether the model beats "the longer one wins", in words."""
    above: Share = figures["accuracy_above_longer_wins"]
    by = f"by {100 * above.value:+.1f} points [{100 * above.low:+.1f}, {100 * above.high:+.1f}]"
    if above.low > 0:
        return f"the model beats it {by}."
    if above.high < 0:
        return f"the model is WORSE than that, {by}. Do not train against it: look at the data."
    return f"the model does NOT surely beat it, {by}. It may know little but length: give it more comparisons."


def markdown(figures: dict[str, Any]) -> str:
    """The whole report, to be read."""
    lines = ["# Reward model on held-out comparisons", "", summary(figures).replace("\n", "\n\n"), ""]
    for title, name in (
        ("Which answer is better", "by_better"),
        ("Length of the better answer beside the worse one's", "by_length"),
        ("Difference of grades", "by_grade"),
    ):
        lines += [f"| {title} | pairs | accuracy [95 %] | mean margin |", "|---|---:|---:|---:|"]
        lines += [_line(row["name"], row["pairs"], row["accuracy"], row["margin"]) for row in figures[name]] + [""]
    lines += ["| Certainty of the model | pairs | predicted | observed |", "|---|---:|---:|---:|"]
    for row in figures["calibration"]["bins"]:
        observed = f"{row['predicted']:.1%} | {row['observed']:.1%}"
        lines += [f"| {row['from']:.0%} to {row['to']:.0%} | {row['pairs']:,} | {observed} |"]
    lines += [
        "",
        f"Pairs with equal grades ({figures['tied_pairs']:,}) say nothing and are not counted. Equal scores, or equal "
        "lengths, count half. Margins are in deviations of the normalised score. Intervals take prompts, not pairs, "
        "as independent. Certainty is sigmoid(raw margin).",
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, pairs: int, accuracy: Share, margin: float | None) -> str:
    return f"| {name} | {pairs:,} | {accuracy} | {'' if margin is None else f'{margin:.2f}'} |"


def write_report(directory: Path, figures: dict[str, Any]) -> None:
    """report.json and report.md. JSON has no word for a number that is not there: null."""
    write_durably(directory / "report.json", json.dumps(_plain(figures), ensure_ascii=False, indent=1) + "\n")
    write_durably(directory / "report.md", markdown(figures))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return None if value != value else value
