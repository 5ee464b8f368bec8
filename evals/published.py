"""Scores that others published (`published.yaml`), with the intervals that can be known for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from engine.intervals import wilson_interval

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Score:
    """value: a fraction, as printed; low, high: Wilson's 95 % interval where the score is a share of n known items."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of a published table; the file says what each field means."""

    id: str
    name: str
    metric: str
    n: int | None
    comparable: str
    note: str
    beside: Mapping[str, tuple[str, ...]]
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Published:
    """A published table: models in order, columns in order, and where they were read."""

    source: str
    url: str
    paper: str
    note: str
    models: tuple[str, ...]
    columns: tuple[Column, ...]


@cache
def read_published() -> Published:
    """The table of the ChiMed-GPT authors."""
    found = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    rows = {model: dict(zip(found["columns"], scores, strict=True)) for model, scores in found["rows"].items()}
    columns = tuple(
        Column(
            id,
            entry["name"],
            entry["metric"],
            entry.get("n"),
            entry["comparable"],
            entry["note"],
            {task: tuple(metrics) for task, metrics in entry["beside"].items()},
            {model: score(scores[id], entry.get("n"), entry.get("interval")) for model, scores in rows.items()},
        )
        for id, entry in found["columns"].items()
    )
    source = found["source"]
    return Published(source["name"], source["url"], source["paper"], source["note"], tuple(rows), columns)


def score(percent: float, n: int | None = None, interval: str | None = None) -> Score:
    """A printed score. It has an interval only if a whole number of n successes prints as it: otherwise it is no share
    of these items."""
    value = percent / 100
    if interval != "wilson" or not n or abs(round(value * n) / n * 100 - percent) > 0.0051:
        return Score(value)
    return Score(value, *wilson_interval(round(value * n) / n, n))
