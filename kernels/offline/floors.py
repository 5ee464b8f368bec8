"""The time that no version of an op can beat on a chip, by its maker's figures: a bound, not a measurement.

    floor = max(bytes / bandwidth, operations / peak)

Nothing reaches it: copies run at some 90 per cent of the bandwidth that is printed, large products at 70 to 80 per
cent of the peak. On a GPU `make bench-kernels` measures both rates and holds the ops to those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kernels.bench.workload import Work
from kernels.offline.audit import Case


@dataclass(frozen=True)
class DataSheet:
    """bandwidth: bytes a second. peak: dense 16-bit operations a second."""

    name: str
    bandwidth: float
    peak: float

    def microseconds(self, work: Work) -> float:
        return 1e6 * max(work.bytes / self.bandwidth, work.flops / self.peak)


# NVIDIA's data sheets of the SXM modules.
DATA_SHEETS = (
    DataSheet("A100 80GB", 2.039e12, 312e12),
    DataSheet("H100", 3.35e12, 989e12),
    DataSheet("H200", 4.8e12, 989e12),
)


@dataclass(frozen=True)
class Floor:
    """What a case must move and compute at the least; microseconds on each chip, in the order of DATA_SHEETS."""

    op: str
    stage: str
    case: str
    dtype: str
    bytes: float
    flops: float
    microseconds: tuple[float, ...]


def floors(cases: Iterable[Case]) -> Iterator[Floor]:
    """Of the cases that say what their work is."""
    for case in cases:
        for stage, work in (case.work or {}).items():
            times = tuple(sheet.microseconds(work) for sheet in DATA_SHEETS)
            dtype = str(case.dtype).removeprefix("torch.")
            yield Floor(case.op, stage, case.shape, dtype, work.bytes, work.flops, times)
