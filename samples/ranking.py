"""How the models of a report rank, task by task, as far as their differences are sure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

LEVEL = 0.05


def ranking(report: Path) -> list[str]:
    """A line for each task of a `report.json`: its models in the report's order, and how each is to the next one.

    < is worse and > is better where the paired comparison of the task's first metric says so at 5 % (Bonferroni over
    the line's comparisons); ~ is all that is not sure.
    """
    found = json.loads(report.read_text(encoding="utf-8"))
    lines = []
    for section in found["sections"]:
        models = [entry["model"] for entry in section["entries"]]
        better = {metric["name"]: metric["better"] for metric in section["entries"][0]["metrics"]}[section["headline"]]
        sides = {(one["a"], one["b"]): one for one in section["comparisons"] if one["metric"] == section["headline"]}
        line = models[0]
        for pair in itertools.pairwise(models):
            line += f" {_sign(sides.get(pair), better, len(models) - 1)} {pair[1]}"
        lines.append(f"{section['label']:12}{line}")
    return lines


def _sign(comparison: dict[str, Any] | None, better: str | None, comparisons: int) -> str:
    """Of the first model to the second."""
    if comparison is None or better is None or comparison["p"] is None or comparison["p"] * comparisons >= LEVEL:
        return "~"
    return "<" if (comparison["difference"]["value"] < 0) == (better == "higher") else ">"
