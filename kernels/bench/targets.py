"""The figures aimed at, on one H200; what they are read from is measured in the same run."""

from __future__ import annotations

from kernels.bench.workload import OURS, Pass, Results, Row, Target

MIB = 1 << 20


def percent(stage: Pass, limit: float) -> Target:
    """Per cent of the measured ceiling."""
    return Target(stage, "% of the ceiling", limit, True, lambda results: _of(results, OURS, stage, "percent"))


def teraflops(stage: Pass, limit: float) -> Target:
    def value(results: Results) -> float | None:
        rate = _of(results, OURS, stage, "rate")
        return None if rate is None else rate / 1e12

    return Target(stage, "TFLOP/s", limit, True, value)


def times(stage: Pass, other: str, limit: float) -> Target:
    """Time as a multiple of another contender's."""

    def value(results: Results) -> float | None:
        ours, theirs = (milliseconds(results.get((name, stage))) for name in (OURS, other))
        return None if ours is None or theirs is None else ours / theirs

    return Target(stage, f"× the time of {other}", limit, False, value)


def extra_memory(stage: Pass, limit: int) -> Target:
    """Bytes at the peak beyond inputs and results."""

    def value(results: Results) -> float | None:
        extra = _of(results, OURS, stage, "extra")
        return None if extra is None else extra / MIB

    return Target(stage, "MiB beyond inputs and results", limit / MIB, False, value)


def share_of_best(stage: Pass, chooser: str, limit: float) -> Target:
    """Speed of a contender that chooses among our providers, as a share of the fastest's."""

    def value(results: Results) -> float | None:
        chosen = milliseconds(results.get((chooser, stage)))
        rows = [row for (_, at), row in results.items() if at == stage and row.role in ("ours", "provider")]
        timed = [one for one in map(milliseconds, rows) if one is not None]
        return None if chosen is None else min(timed) / chosen

    return Target(stage, f"of the fastest provider's speed, by {chooser}", limit, True, value)


def milliseconds(row: Row | None) -> float | None:
    return None if row is None or row.times is None else row.times.median


def _of(results: Results, contender: str, stage: Pass, attribute: str) -> float | None:
    row = results.get((contender, stage))
    return None if row is None else getattr(row, attribute)
