"""What a run found: rows, verdicts on targets, and how ours compares with Liger's over all ops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kernels.bench.ceilings import Ceilings
from kernels.bench.host import HostRow
from kernels.bench.workload import Pass, Results, Row, Workload

Key = tuple[str, str, str]  # op, shape, dtype
# Against Liger's: no op slower, and so much faster in the median and in the geometric mean.
LIGER_TARGETS = {"slowest": 1.0, "median": 1.15, "geometric mean": 1.4}


@dataclass(frozen=True)
class Verdict:
    """A target, what was found, and `met`, `missed` or `not measured`."""

    op: str
    shape: str
    dtype: str
    stage: Pass
    target: str
    value: float | None
    verdict: str


@dataclass
class Findings:
    """missing: peers that are not there, and why. unmeasured: workloads that the time did not suffice for."""

    machine: dict[str, str]
    ceilings: Ceilings
    ceiling_lines: list[str]
    missing: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    host: list[HostRow] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)

    def add(self, workload: Workload, rows: Iterable[Row]) -> list[Row]:
        """Keep a workload's rows and judge its targets. Returns the rows."""
        added = list(rows)
        self.rows += added
        results: Results = {(row.contender, row.stage): row for row in added}
        for target in workload.targets:
            value, verdict = target.verdict(results)
            where = workload.op, workload.shape, str(workload.dtype).removeprefix("torch."), target.stage
            self.verdicts.append(Verdict(*where, target.text, value, verdict))
        return added

    @property
    def wrong(self) -> list[Row]:
        """Ours, by any provider, where it failed or was wrong."""
        return [row for row in self.rows if row.role in ("ours", "provider") and row.note]

    @property
    def failed_peers(self) -> list[Row]:
        return [row for row in self.rows if row.role in ("peer", "bound") and row.note]

    def ours(self) -> list[Row]:
        return [row for row in self.rows if row.role == "ours"]

    def others(self, row: Row) -> list[Row]:
        """Whoever did the same job."""
        return [one for one in self.rows if _job(one) == _job(row) and one is not row]

    def best_peer(self, row: Row) -> Row | None:
        timed = [one for one in self.others(row) if one.role == "peer" and one.times is not None]
        return min(timed, key=lambda one: one.times.median, default=None)  # type: ignore[union-attr]

    def speed_over(self, row: Row, other: Row | None) -> float | None:
        """Above one where ours is faster."""
        if row.times is None or other is None or other.times is None:
            return None
        return other.times.median / row.times.median

    def liger_ratios(self) -> dict[str, float]:
        """Of every shape: Liger's time over ours, forward and backward together where there is a backward."""
        return dict(self._liger_ratios())

    def _liger_ratios(self) -> Iterator[tuple[str, float]]:
        for row in self.ours():
            whole = "both" if any(_key(one) == _key(row) and one.stage == "both" for one in self.rows) else "forward"
            liger = [one for one in self.others(row) if one.contender.startswith("liger") and one.times is not None]
            if row.stage == whole and row.times is not None and liger:
                best = min(one.times.median for one in liger)  # type: ignore[union-attr]
                yield f"{row.op} {row.shape} {row.dtype}", best / row.times.median

    def liger_summary(self) -> dict[str, float]:
        """`slowest`, `median` and `geometric mean` of the ratios; empty without Liger."""
        ratios = list(self.liger_ratios().values())
        if not ratios:
            return {}
        return {
            "slowest": min(ratios),
            "median": statistics.median(ratios),
            "geometric mean": math.exp(statistics.fmean(math.log(ratio) for ratio in ratios)),
        }

    def liger_verdict(self) -> str:
        summary = self.liger_summary()
        if not summary:
            return f"Liger-Kernel: not measured ({self.missing.get('liger', 'none of its ops took part')})."
        parts = [
            f"{name} {value:.2f} ({'met' if value >= LIGER_TARGETS[name] else 'missed'}: ≥ {LIGER_TARGETS[name]:g})"
            for name, value in summary.items()
        ]
        return f"Speed over Liger-Kernel's, {len(self.liger_ratios())} shapes: {', '.join(parts)}."

    def verdict_of(self, row: Row) -> str:
        """On a row of ours: `met`, `missed: what`, or nothing where nothing was aimed at or measured."""
        found = [one for one in self.verdicts if (one.op, one.shape, one.dtype, one.stage) == (*_key(row), row.stage)]
        missed = [one.target for one in found if one.verdict == "missed"]
        if missed:
            return f"missed: {'; '.join(missed)}"
        return "met" if any(one.verdict == "met" for one in found) else ""


def _key(row: Row) -> Key:
    return row.op, row.shape, row.dtype


def _job(row: Row) -> tuple[Key, Pass]:
    return _key(row), row.stage
