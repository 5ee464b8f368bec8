"""One workload: every contender is checked, then all are timed in turn.

A result is right when its relative error in the Euclidean norm is at most two last places of a 16-bit number, or
1e-4 in fp32, which products in tf32 exceed. That finds what is wrong; how precise an op is, its tests say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.bench.ceilings import Ceilings
from kernels.bench.clock import Clock, Round, race
from kernels.bench.workload import Contender, Inputs, Outcome, Pass, Row, Workload

# A round moves at least so many bytes, over at most so many sets of arguments. What a kernel leaves in the cache
# when a round ends, at most 60 MB on an H200, is then a small part of it.
ROUND_BYTES, MOST_SETS = 1 << 30, 8


_Rows = dict[tuple[Pass, str], dict[str, Any]]


def measure(workload: Workload, clock: Clock, ceilings: Ceilings) -> list[Row]:
    """A row for every pass and contender, the failed ones too."""
    entries = [(stage, one) for stage in workload.stages for one in workload.contenders if stage in one.passes]
    rows: _Rows = {(stage, one.name): _row(workload, stage, one, ceilings) for stage, one in entries}
    try:
        _fill(rows, workload, clock)
    except Exception as error:  # nobody's in particular: no memory for the inputs, a device that has given up
        for fields in rows.values():
            if fields["times"] is None and not fields["note"]:
                fields.update(note=explain(error))
    return [Row(**fields) for fields in rows.values()]


def _fill(rows: _Rows, workload: Workload, clock: Clock) -> None:
    contenders = []
    for contender in workload.contenders:
        note, extra = _try(workload, contender, clock)
        for stage in workload.stages:
            if (stage, contender.name) in rows:
                rows[stage, contender.name].update(note=note, extra=extra.get(stage))
        if not note:
            contenders.append(contender)
    for stage in workload.stages:
        racing = [one for one in contenders if stage in one.passes]

        def failed(name: str, error: Exception, stage: Pass = stage) -> None:
            rows[stage, name].update(note=explain(error))

        seats = _seats(workload, stage, racing, failed)
        rounds = {name: Round(seat.run, len(seat.sets)) for name, seat in seats.items()}
        for name, times in race(clock, rounds, failed).items():
            rows[stage, name].update(times=times)
        del seats, rounds


def explain(error: Exception) -> str:
    """One line on why a contender failed."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"[:200]


def _row(workload: Workload, stage: Pass, contender: Contender, ceilings: Ceilings) -> dict[str, Any]:
    work = workload.work_of(stage)
    return {
        "op": workload.op,
        "shape": workload.shape,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "stage": stage,
        "contender": contender.name,
        "role": contender.role,
        "work": work,
        "floor": ceilings.floor(work.bytes, work.flops),
        "times": None,
        "note": "",
    }


def _try(workload: Workload, contender: Contender, clock: Clock) -> tuple[str, dict[Pass, int]]:
    """Check a contender's outcome. Returns why it may not race, or nothing; and its extra memory by pass."""
    stages = [stage for stage in workload.stages if stage in contender.passes]
    extra: dict[Pass, int] = {}
    try:
        if contender.role != "bound":
            note = fault(workload, contender)
            if note:
                return note, extra
        if clock.measures_memory:
            for stage in stages:
                if stage != "backward":
                    extra[stage] = _extra(workload, contender, stage, clock)
    except Exception as error:  # a peer's code may raise anything; ours is reported as loudly
        return explain(error), extra
    return "", extra


def fault(workload: Workload, contender: Contender) -> str:
    """What is wrong with a contender's results and gradients, or nothing."""
    inputs = workload.make(0)
    its_inputs = _adapted(contender, inputs)
    outputs = _call(workload, contender, its_inputs)
    upstream = _upstream(workload, outputs)
    outcome: Outcome = outputs, []
    if workload.has_backward:
        outcome = outputs, list(_gradients(outputs, its_inputs, upstream))
        upstream = _upstream(workload, outputs)  # a backward may have written over it
    if contender.canonical is not None:
        outcome = contender.canonical(outcome)
    fresh = workload.make(0) if contender.spoils else inputs
    with torch.no_grad():
        outcome = [x.detach() for x in outcome[0]], outcome[1]
    for what, found, expected in workload.check(fresh, upstream, outcome):
        if found.shape != expected.shape:
            return f"wrong: {what} is {tuple(found.shape)}, not {tuple(expected.shape)}"
        error = relative_error(found, expected)
        if not error <= allowed_error(workload.dtype):
            return f"wrong: {what} is off by {error:.2g} of its norm"
    return ""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; of a zero, the norm of what was found."""
    difference = torch.linalg.vector_norm(found.float() - expected.float()).item()
    return difference / (torch.linalg.vector_norm(expected.float()).item() or 1.0)


def allowed_error(dtype: torch.dtype) -> float:
    return 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def _extra(workload: Workload, contender: Contender, stage: Pass, clock: Clock) -> int:
    """Bytes at the peak of a call beyond its inputs and results."""
    inputs = _adapted(contender, workload.make(0))
    upstream = _upstream(workload, _call(workload, contender, inputs)) if stage == "both" else []
    results, peak = clock.peak(lambda: _pass(workload, contender, inputs, upstream, stage))
    old = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, Tensor)}
    new = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in results}
    return max(0, peak - sum(size for place, size in new.items() if place not in old))


@dataclass
class _Seat:
    """A contender with its sets of arguments. Results stay until the next round, at addresses of their own."""

    sets: list[Inputs]
    run: Callable[[], None]


def _seats(
    workload: Workload, stage: Pass, contenders: Sequence[Contender], failed: Callable[[str, Exception], None]
) -> dict[str, _Seat]:
    count = max(1, min(MOST_SETS, math.ceil(ROUND_BYTES / max(1.0, workload.work_of(stage).bytes))))
    shared = [workload.make(seed) for seed in range(count)]
    seats = {}
    for contender in contenders:
        try:
            sets = [_adapted(contender, inputs) for inputs in shared]
            seats[contender.name] = _Seat(sets, runner(workload, contender, stage, sets))
        except Exception as error:  # as in _try
            failed(contender.name, error)
    return seats


def runner(workload: Workload, contender: Contender, stage: Pass, sets: list[Inputs]) -> Callable[[], None]:
    """A round: one pass on every set of arguments. What a backward needs of its forward is made here."""
    kept: list[Any] = [None] * len(sets)
    upstream: list[list[Tensor]] = [[] for _ in sets]
    graphs: list[list[Tensor]] = []
    if stage != "forward":
        graphs = [_call(workload, contender, inputs) for inputs in sets]
        upstream = [_upstream(workload, outputs) for outputs in graphs]

    if stage == "backward":

        def run() -> None:
            for index, inputs in enumerate(sets):
                kept[index] = _gradients(graphs[index], inputs, upstream[index], retain_graph=True)

    else:
        graphs.clear()

        def run() -> None:
            for index, inputs in enumerate(sets):
                kept[index] = _pass(workload, contender, inputs, upstream[index], stage)

    return run


def _pass(
    workload: Workload, contender: Contender, inputs: Inputs, upstream: list[Tensor], stage: Pass
) -> list[Tensor]:
    outputs = _call(workload, contender, inputs)
    if stage == "forward" or not any(x.requires_grad for x in outputs):
        return outputs
    return [*outputs, *_gradients(outputs, inputs, upstream)]


def _call(workload: Workload, contender: Contender, inputs: Inputs) -> list[Tensor]:
    with torch.set_grad_enabled(workload.has_backward):
        results = contender.call(*inputs)
    results = (results,) if isinstance(results, Tensor) else results or ()
    return [x for x in results if x is not None]


def _upstream(workload: Workload, outputs: Sequence[Tensor]) -> list[Tensor]:
    """A gradient for every result that takes one; the same ones for every contender."""
    upstream = []
    for index, output in enumerate(outputs):
        if workload.upstream == "ones":
            upstream.append(torch.ones_like(output))
        else:
            generator = torch.Generator(output.device).manual_seed(1000 + index)
            numbers = torch.empty(output.shape, dtype=torch.float32, device=output.device)
            upstream.append(numbers.normal_(generator=generator).to(output.dtype))
    return upstream


def _gradients(
    outputs: Sequence[Tensor], inputs: Inputs, upstream: Sequence[Tensor], retain_graph: bool = False
) -> Sequence[Tensor]:
    """New tensors every time: nothing is accumulated."""
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=retain_graph)


def _adapted(contender: Contender, inputs: Inputs) -> Inputs:
    if contender.adapt is not None:
        return contender.adapt(inputs)
    if contender.spoils:
        return tuple(_copy(x) if isinstance(x, Tensor) else x for x in inputs)
    return inputs


def _copy(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
