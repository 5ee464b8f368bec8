"""What is measured: a job of a certain size, who does it, how a result is checked, and what is aimed at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.bench.clock import Times

Pass = Literal["forward", "backward", "both"]
PASSES: tuple[Pass, ...] = ("forward", "backward", "both")
# Ours and its peers compete. A provider is our op again, by other means. A bound is other work of a known relation
# to ours, which a target compares it with.
Role = Literal["ours", "peer", "provider", "bound"]
OURS = "ours"

Inputs = tuple[Any, ...]
# Results, then gradients of the inputs that have one, in order.
Outcome = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Work:
    """Bytes that must be read and written, and operations that must be done, whoever does the job."""

    bytes: float
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Contender:
    """One way of doing a job.

    call: takes the inputs in order and returns a tensor or several (None among them is left out).
    adapt: makes inputs of its own out of the workload's, in a layout that suits it; not timed.
    canonical: brings its outcome into the form of ours, for the check. Bounds are not checked.
    passes: those it takes part in; by default all that the workload has.
    spoils: it writes into its inputs, so it is given copies.
    """

    name: str
    call: Callable[..., Any]
    role: Role = "peer"
    adapt: Callable[[Inputs], Inputs] | None = None
    canonical: Callable[[Outcome], Outcome] | None = None
    passes: tuple[Pass, ...] = PASSES
    spoils: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the result.

    times: None when it could not be measured; then `note` says why.
    floor: milliseconds that the measured ceilings allow at best.
    extra: bytes at the peak beyond inputs and results, where memory is measured.
    """

    op: str
    shape: str
    dtype: str
    stage: Pass
    contender: str
    role: Role
    work: Work
    floor: float
    times: Times | None
    extra: int | None = None
    note: str = ""

    @property
    def percent(self) -> float | None:
        """Of the measured ceiling that binds."""
        return None if self.times is None else 100 * self.floor / self.times.median

    @property
    def rate(self) -> float | None:
        """Bytes, or operations where these bind, a second."""
        amount = self.work.flops if self.is_bound_by_products else self.work.bytes
        return None if self.times is None else 1e3 * amount / self.times.median

    # Operations a byte above which no chip of ours is bound by memory; 160 to 300 is where they turn.
    @property
    def is_bound_by_products(self) -> bool:
        return self.work.flops > 150 * self.work.bytes


Results = dict[tuple[str, Pass], Row]


@dataclass(frozen=True)
class Target:
    """A figure aimed at.

    what: the figure in words, with its unit.
    value: reads it off the results, None when something was not measured.
    """

    stage: Pass
    what: str
    limit: float
    at_least: bool
    value: Callable[[Results], float | None]

    def verdict(self, results: Results) -> tuple[float | None, str]:
        """(the figure, `met`, `missed` or `not measured`)"""
        value = self.value(results)
        if value is None:
            return None, "not measured"
        is_met = value >= self.limit if self.at_least else value <= self.limit
        return value, "met" if is_met else "missed"

    @property
    def text(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g} {self.what}"


@dataclass(frozen=True)
class Workload:
    """A job.

    work: of each pass but `both`; an op without a backward has `forward` only.
    make: inputs from a seed, the same for the same seed. Those that require a gradient get one.
    check: of the inputs, the upstream gradients and an outcome: triples (what, found, expected).
    upstream: gradients that results receive: random numbers, or ones where a peer returns their sum.
    is_whole: contenders differ in which pass does the work, so that only both together mean something.
    """

    op: str
    shape: str
    dtype: torch.dtype
    work: dict[Pass, Work]
    make: Callable[[int], Inputs]
    contenders: Sequence[Contender]
    check: Callable[[Inputs, list[Tensor], Outcome], Iterable[tuple[str, Tensor, Tensor]]]
    upstream: Literal["random", "ones"] = "random"
    targets: Sequence[Target] = field(default_factory=tuple)
    is_whole: bool = False

    @property
    def has_backward(self) -> bool:
        return "backward" in self.work

    @property
    def stages(self) -> tuple[Pass, ...]:
        if not self.has_backward:
            return ("forward",)
        return ("both",) if self.is_whole else PASSES

    def work_of(self, stage: Pass) -> Work:
        return self.work["forward"] + self.work["backward"] if stage == "both" else self.work[stage]

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')}"
