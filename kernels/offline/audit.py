"""Every launch of every case, compiled for both chips and held to the limits.

Candidates of the launch table are compiled too. They may break limits, as long as they are not dispatched.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.bench.work import Works
from kernels.launches import ARCHITECTURES, Lookup, observed_table
from kernels.offline.compile import compile_launch
from kernels.offline.limits import broken_limits
from kernels.offline.record import Launch, record

# Matrix instructions of 16-bit products.
ON_TENSOR_CORES = {80: "mma", 90: "wgmma"}


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an op, and its backward where inputs require a gradient.

    shape: in words. width: columns of a row, or entries of a head. arguments: makes those of the call.
    wide_share: how much of what the code loads and stores must go 16 bytes at a time; 0 where rows begin anywhere.
    products: the instruction that 16-bit matrix products should become, for each architecture.
    is_model: candidates of the launch table are tried on this case; they would do the same on its like.
    work: the least that each pass must move and compute, where that is worth a line in the report.
    chips: those it is compiled for; numbers of 8 bits are none of sm_80.
    """

    op: str
    shape: str
    dtype: torch.dtype
    width: int
    call: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]
    wide_share: float = 0.5
    products: dict[int, str] | None = None
    is_model: bool = False
    work: Works | None = None
    chips: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Row:
    """One kernel in one form on one chip.

    case: the first that launches it, in words. is_dispatched: by the ops; else it is a candidate of the tuner.
    registers: a thread; spilled, shared: bytes, a thread and a program; loads, stores: bytes of the widest access.
    broken: which limits it breaks, in words; a kernel that does not compile has no figures.
    """

    op: str
    stage: str
    case: str
    dtype: str
    width: int
    arch: int
    kernel: str
    options: str
    is_dispatched: bool
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    loads: int = 0
    stores: int = 0
    products: str | None = None
    broken: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.op} {self.stage} on sm_{self.arch}, {self.case}, {self.dtype}; {self.options}"


@dataclass
class Audit:
    """rows: every kernel in every form. silent: cases that launch no kernel, or use no tensor core where they should.
    uncovered: kernels that no case launches. idle: entries of the launch table that are wrong or that nobody asks for.
    """

    rows: list[Row]
    silent: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """Limits that kernels break which are dispatched; a line for all forms with one fault."""
        alike: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            for fault in row.broken if row.is_dispatched else ():
                alike.setdefault((row.kernel, fault), []).append(row)
        lines = []
        for (kernel, fault), rows in alike.items():
            others = f", and {len(rows) - 1} more forms" if len(rows) > 1 else ""
            lines.append(f"{kernel}: {fault}\n    {rows[0].label}{others}")
        return lines

    @property
    def dropped(self) -> list[Row]:
        """Candidates beyond a limit."""
        return [row for row in self.rows if row.broken and not row.is_dispatched]

    @property
    def failures(self) -> list[str]:
        """Everything that must not be, in words."""
        return self.broken + self.silent + self.uncovered + self.idle


_Form = tuple[Any, ...]


@dataclass(frozen=True)
class _Job:
    """A launch to compile. is_trial: with a candidate in the place of an entry of the launch table."""

    case: Case
    stage: str
    launch: Launch
    arch: int
    is_trial: bool = False

    @property
    def form(self) -> _Form:
        """What decides the machine code."""
        launch = self.launch
        return launch.kernel.cache_key, launch.signature, launch.constants, launch.aligned, launch.options, self.arch


def audit_cases(cases: Iterable[Case], workers: int | None = None) -> tuple[Audit, set[Lookup]]:
    """Record, compile and judge; every form of a kernel once. With what was asked of the launch table.

    Args:
        workers: processes that compile; one for every core when None.
    """
    cases = list(cases)
    jobs: dict[_Form, _Job] = {}  # those that ops dispatch come before candidates of the same form
    asked: set[Lookup] = set()
    forms: dict[tuple[Case, str, int], list[_Form]] = {}
    for arch in ARCHITECTURES:
        for case in _of_chip(cases, arch):
            launched, lookups = _launches(case, arch)
            asked.update(lookups)
            for stage, launches in launched.items():
                these = [_Job(case, stage, launch, arch) for launch in launches]
                forms[case, stage, arch] = [job.form for job in these]
                for job in these:
                    jobs.setdefault(job.form, job)
    for arch in ARCHITECTURES:
        for case in _of_chip(cases, arch):
            for job in _trials(case, arch) if case.is_model else ():
                jobs.setdefault(job.form, job)
    rows = dict(zip(jobs, _compile_all(list(jobs.values()), workers or os.cpu_count() or 1), strict=True))
    silent = [
        f"{case.op}: {reason}\n    {stage} on sm_{arch}, {case.shape}, {case.dtype}"
        for (case, stage, arch), of_stage in forms.items()
        for reason in _silent(case, arch, [rows[form] for form in of_stage])
    ]
    return Audit(list(rows.values()), silent), asked


def _of_chip(cases: Iterable[Case], arch: int) -> Iterable[Case]:
    return (case for case in cases if arch in case.chips)


def _silent(case: Case, arch: int, rows: list[Row]) -> Iterable[str]:
    if not rows:
        yield "launches no kernel"
    elif case.products is not None and not any(row.products or row.broken for row in rows):
        yield f"no kernel uses {case.products[arch]}"


def _launches(
    case: Case, arch: int, trials: Mapping[tuple[str, str], Mapping[str, int]] | None = None
) -> tuple[dict[str, list[Launch]], list[Lookup]]:
    """What a case launches, forward and backward, and what it asks the table for."""
    arguments = case.arguments()
    outputs: list[torch.Tensor] = []

    def forward() -> None:
        result = case.call(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        outputs.extend(x for x in results if isinstance(x, torch.Tensor) and x.requires_grad)

    with observed_table(trials) as lookups:
        launched = {"forward": record(forward, arch)}
        if outputs:
            upstream = [torch.empty_like(x) for x in outputs]
            launched["backward"] = record(lambda: torch.autograd.backward(outputs, upstream), arch)
    return launched, lookups


def _trials(case: Case, arch: int) -> Iterable[_Job]:
    """The case with every candidate in the place of every entry it asks for, one at a time."""
    _, lookups = _launches(case, arch)
    for lookup in dict.fromkeys(lookups):
        entry = lookup.kernel, lookup.key
        for candidate in lookup.candidates():
            launched, _ = _launches(case, arch, {entry: candidate})
            for stage, launches in launched.items():
                for launch in launches:
                    yield _Job(case, stage, launch, arch, is_trial=True)


_jobs: list[_Job] = []


def _compile_all(jobs: list[_Job], workers: int) -> list[Row]:
    """In processes that are forked, so that kernels, which cannot be pickled, are theirs already."""
    global _jobs
    _jobs = jobs
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_one, range(len(_jobs))))


def _compile_one(index: int) -> Row:
    job = _jobs[index]
    case, launch = job.case, job.launch
    options = ", ".join(f"{name} {value}" for name, value in _telling(launch))
    dtype = str(case.dtype).removeprefix("torch.")
    row = (case.op, job.stage, case.shape, dtype, case.width, job.arch, launch.name, options, not job.is_trial)
    try:
        found = compile_launch(launch, job.arch)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Row(*row, broken=(f"does not compile: {reason[-1]}",))
    figures = found.registers, found.spilled, found.shared, found.loads, found.stores, found.products
    products = None if case.products is None else case.products[job.arch]
    return Row(*row, *figures, broken=tuple(broken_limits(launch, found, case.wide_share, products)))


def _telling(launch: Launch) -> list[tuple[str, object]]:
    """Blocks, warps and stages."""
    blocks = [(name, value) for name, value in launch.constants if name.startswith("BLOCK")]
    return blocks + [(name.removeprefix("num_"), value) for name, value in launch.options]
