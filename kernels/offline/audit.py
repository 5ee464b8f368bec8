"""Every launch of every case, compiled for both chips and held to limits.

    spills      none
    memory      shared memory within what one program may have
    accesses    the widest load and the widest store move 16 bytes, where rows begin at multiples of that
    products    16-bit matrix products become `wgmma` on Hopper and `mma` on Ampere
    offsets     no address is made with a product that can leave 32 bits

The launch table is held to more: every entry is asked for by some case, stands among the candidates that its module
names, and keeps the limits. Other candidates may break them; they are dropped, and the tuner must not choose them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import torch
import triton

import kernels
from kernels.launches import ARCHITECTURES, Lookup, observed_table, read_table
from kernels.offline.cases import Case
from kernels.offline.compile import SHARED_MEMORY, Compiled, compile_launch
from kernels.offline.offsets import narrow_offsets
from kernels.offline.record import Launch, record

# Kernels that move next to nothing, or ragged runs that begin anywhere: the width of their accesses is no matter.
NARROW = {
    "_gae_kernel": "trajectories begin anywhere; a few megabytes an iteration",
}


@dataclass(frozen=True)
class Row:
    """One kernel in one form on one chip.

    case: the first that launches it, in words. is_dispatched: by the ops; else it is a candidate of the tuner.
    registers: a thread; spilled, shared: bytes, a thread and a program; loads, stores: bytes of the widest access.
    broken: which limits it breaks, in words. error: the compiler's, with the figures left at zero.
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
        return f"sm_{self.arch} {self.kernel} ({self.op} {self.stage}, {self.case}, {self.dtype}; {self.options})"


@dataclass
class Audit:
    """failures: everything that must not be, in words. dropped: candidates that break limits."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> list[Row]:
        return [row for row in self.rows if row.broken and not row.is_dispatched]


@dataclass(frozen=True)
class _Job:
    """A launch to compile. trial: (kernel of the table, key) where it is a candidate's."""

    case: Case
    stage: str
    launch: Launch
    arch: int
    trial: tuple[str, str] | None = None

    @property
    def form(self) -> tuple[object, ...]:
        """What decides the machine code."""
        launch = self.launch
        return launch.kernel.cache_key, launch.signature, launch.constants, launch.aligned, launch.options, self.arch


def run_audit(cases: Iterable[Case], workers: int | None = None) -> Audit:
    """Record, compile and judge all cases; every form of a kernel once.

    Args:
        workers: processes that compile; one for every core when None.
    """
    audit = Audit()
    jobs, lookups = _record_all(list(cases), audit)
    audit.rows = _compile_all(jobs, workers or os.cpu_count() or 1)
    audit.failures += [
        f"{row.label}: {', '.join(row.broken)}" for row in audit.rows if row.broken and row.is_dispatched
    ]
    audit.failures += _table_failures(lookups, {job.trial for job in jobs.values()}, audit.rows)
    return audit


def _record_all(cases: list[Case], audit: Audit) -> tuple[dict[tuple[object, ...], _Job], set[Lookup]]:
    """One job for every form, those that ops dispatch first."""
    jobs: dict[tuple[object, ...], _Job] = {}
    asked: set[Lookup] = set()
    for arch in ARCHITECTURES:
        for case in cases:
            launched, lookups = _launches(case, arch)
            asked.update(lookups)
            for stage, launches in launched.items():
                if not launches:
                    audit.failures.append(f"sm_{arch} {case.op} {stage}, {case.shape}: launches no kernel")
                for launch in launches:
                    job = _Job(case, stage, launch, arch)
                    jobs.setdefault(job.form, job)
        for case in cases:
            if case.is_model:
                for job in _trials(case, arch):
                    jobs.setdefault(job.form, job)
    return jobs, asked


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
                    yield _Job(case, stage, launch, arch, entry)


_jobs: list[_Job] = []


def _compile_all(jobs: Mapping[tuple[object, ...], _Job], workers: int) -> list[Row]:
    """In processes that are forked, so that kernels, which cannot be pickled, are theirs already."""
    global _jobs
    _jobs = list(jobs.values())
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(_compile_one, range(len(_jobs))))


def _compile_one(index: int) -> Row:
    job = _jobs[index]
    case, launch = job.case, job.launch
    options = ", ".join(f"{name} {value}" for name, value in _telling(launch))
    dtype = str(case.dtype).removeprefix("torch.")
    row = (case.op, job.stage, case.shape, dtype, case.width, job.arch, launch.name, options, job.trial is None)
    try:
        found = compile_launch(launch, job.arch)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Row(*row, broken=(f"does not compile: {reason[-1]}",))
    figures = found.registers, found.spilled, found.shared, found.loads, found.stores, found.products
    return Row(*row, *figures, broken=tuple(_broken(case, launch, found)))


def _telling(launch: Launch) -> list[tuple[str, object]]:
    """Blocks, warps and stages."""
    blocks = [(name, value) for name, value in launch.constants if name.startswith("BLOCK")]
    return blocks + [(name.removeprefix("num_"), value) for name, value in launch.options]


def _broken(case: Case, launch: Launch, found: Compiled) -> Iterable[str]:
    if found.spilled:
        yield f"spills {found.spilled} bytes a thread"
    if found.shared > SHARED_MEMORY[found.arch]:
        yield f"needs {found.shared} bytes of shared memory, the chip has {SHARED_MEMORY[found.arch]}"
    if case.is_wide and launch.has_aligned_pointers and launch.name not in NARROW:
        for what, widest in (("load", found.loads), ("store", found.stores)):
            if 0 < widest < 16 and _moves_much(found.ttir, what, launch):
                yield f"its widest {what} moves {widest} bytes"
    if re.search(r"tt\.dot .*: tensor<[\dx]+(?:bf16|f16)>", found.ttir):
        meant = (case.products or {}).get(found.arch)
        if meant is not None and found.products != meant:
            yield f"its products are {found.products}, not {meant}"
    yield from narrow_offsets(found.ttir)


def _moves_much(ttir: str, what: str, launch: Launch) -> bool:
    """Whether one access of the program has 16 bytes for each of its threads."""
    sizes = {"f64": 8, "f32": 4, "i64": 8, "i32": 4, "f16": 2, "bf16": 2, "i16": 2, "i8": 1}
    threads = 32 * dict(launch.options).get("num_warps", 4)
    for shape, kind in re.findall(rf"tt\.{what} .*tensor<((?:\d+x)+)!tt\.ptr<(\w+)>>", ttir):
        count = 1
        for extent in shape.rstrip("x").split("x"):
            count *= int(extent)
        if count * sizes[kind] >= 16 * threads:
            return True
    return False


def _table_failures(lookups: set[Lookup], tried: set[tuple[str, str] | None], rows: list[Row]) -> Iterable[str]:
    """Entries nobody asks for, or that their module does not offer."""
    asked = {(lookup.kernel, lookup.key): lookup for lookup in lookups}
    for kernel, entries in read_table().items():
        for key, entry in entries.items():
            lookup = asked.get((kernel, key))
            if lookup is None:
                yield f"launches.json: no case asks for {kernel}, {key}"
            elif entry not in lookup.candidates():
                yield f"launches.json: {kernel}, {key} is not among the candidates of {lookup.module}"
            elif (kernel, key) not in tried and len(lookup.candidates()) > 1:
                yield f"launches.json: no case tries the candidates of {kernel}, {key}"


def all_kernels() -> dict[str, triton.JITFunction]:
    """Every Triton function of the package that no other calls, by name."""
    found: dict[str, triton.JITFunction] = {}
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            while hasattr(value, "fn") and not isinstance(value, triton.JITFunction):
                value = value.fn
            if isinstance(value, triton.JITFunction) and value.__module__.startswith("kernels."):
                found[value.__name__] = value
    called = {name for name in found for other in found.values() if re.search(rf"\b{name}\(", _body(other))}
    return {name: kernel for name, kernel in found.items() if name not in called}


def _body(kernel: triton.JITFunction) -> str:
    return kernel.src.split("\n", 1)[1]
