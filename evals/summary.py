"""The table that a terminal shows at the end of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from evals.evaluation import Evaluation
from evals.report_format import bounds, number, title


def summary(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """A row a task: its first metric with the 95 % interval and of how many items it is, a column a model."""
    rows = [["task", "metric", "n", *(evaluation.model for evaluation in evaluations)]]
    for label, result in evaluations[0].results.items():
        first = result.metrics[0]
        row = [label, title(first.name) + (f" ({first.unit})" if first.unit else ""), f"{first.n:,}"]
        for evaluation in evaluations:
            metric = evaluation.results[label].metrics[0]
            row.append(f"{number(metric.value, metric.unit)} {bounds(metric.low, metric.high, metric.unit)}".rstrip())
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
