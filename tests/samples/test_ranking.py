"""A ranking says no more than the comparisons do."""

from __future__ import annotations

import json
from pathlib import Path

from evals.evaluation import Evaluation
from evals.report import write_report
from evals.task import Item, Metric, Result
from samples.ranking import ranking

# Six items more are p = 0.031 by McNemar, which three comparisons make 0.094.
RIGHT = {"none": 0, "few": 20, "many": 60, "most": 66}


def of(right: int, better: str) -> Result:
    """A share of 80 items: `right` of them."""
    items = tuple(Item(str(number), {"share": (float(number < right), 1.0)}, "", "", "") for number in range(80))
    return Result((Metric("share", right / 80, n=80, better=better),), items)  # type: ignore[arg-type]


def evaluation(name: str, results: dict[str, Result]) -> Evaluation:
    return Evaluation(name, name, name, results, {label: {} for label in results}, dict.fromkeys(results, "choice"))


def test_only_sure_differences_of_neighbours_rank_them(tmp_path: Path) -> None:
    ways = {"task": "higher", "errors": "lower"}
    write_report(
        [evaluation(name, {label: of(right, way) for label, way in ways.items()}) for name, right in RIGHT.items()],
        tmp_path,
    )
    assert ranking(tmp_path / "report.json") == [
        "task        none < few < many ~ most",
        "errors      none > few > many ~ most",
    ]


def test_what_is_neither_better_nor_worse_ranks_nobody(tmp_path: Path) -> None:
    write_report([evaluation(name, {"task": of(right, None)}) for name, right in RIGHT.items()], tmp_path)  # type: ignore[arg-type]
    assert ranking(tmp_path / "report.json") == ["task        none ~ few ~ many ~ most"]


def test_one_model_alone_has_no_rank(tmp_path: Path) -> None:
    write_report([evaluation("alone", {"task": of(20, "higher")})], tmp_path)
    assert ranking(tmp_path / "report.json") == ["task        alone"]
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["sections"][0]["comparisons"] == []
