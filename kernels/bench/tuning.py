"""Fill the launch table and the table of attention's providers from measurements on the GPU at hand.

For every entry that a call asks the table for, each candidate of its kernel is tried in the entry's place: first all
of them briefly, then the fastest few in turn. The winner must be right, spill nothing, fit the shared memory and keep
the matrix instruction of the entry it replaces. It replaces it only if it is faster by more than what two
measurements of one thing differ by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kernels import launches
from kernels.attention import dispatch
from kernels.bench.attending import attention_workload, decode_workload
from kernels.bench.clock import Clock, Round, race
from kernels.bench.measure import explain, fault, runner
from kernels.bench.tables import piped
from kernels.bench.workload import OURS, Contender, Pass, Workload
from kernels.launches import Lookup, observed_table
from kernels.offline.compile import SHARED_MEMORY, compile_launch
from kernels.offline.record import record

Options = Mapping[str, int]
# Of a brief trial, how many go on to the race; and how much faster than the present entry a winner must be there.
FINALISTS, MARGIN = 4, 1.01
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Choice:
    """What was found for an entry: milliseconds of the present options and of the best; `kept` when they stay.

    tried: candidates. note: why some were passed over.
    """

    kernel: str
    key: str
    shape: str
    tried: int
    before: float
    best: float
    options: Options
    kept: bool
    note: str = ""


def representatives(device: torch.device) -> Iterator[Workload]:
    """Shapes that stand for all of their width: long documents of some billions of operations, a full cache."""
    for width in (128, 64, 256):
        yield attention_workload([8192] * 2, 4096 // width, 4096 // width, width, BF16, device)
        yield decode_workload(64, 4096, 32, 8, width, BF16, device)
    for width in (128, 64):
        yield attention_workload([2048] * 2, 2048 // width, 2048 // width, width, FP32, device)
        yield decode_workload(16, 4096, 32, 8, width, FP32, device)


def tune_launches(
    workloads: Sequence[Workload], clock: Clock, *, kernels: Sequence[str], is_up: Callable[[], bool]
) -> Iterator[Choice]:
    """Choices for the entries that these workloads ask for, each as soon as it is made; the table is not written.

    Args:
        kernels: names in the table; none means all.
        is_up: whether the time is up; asked before every entry.
    """
    done: set[tuple[str, str]] = set()
    for workload in workloads:
        for stage in ("forward", "backward"):
            if stage not in workload.stages:
                continue
            for lookup in lookups(workload, stage):
                entry = lookup.kernel, lookup.key
                if entry in done or (kernels and lookup.kernel not in kernels):
                    continue
                if is_up():
                    return
                done.add(entry)
                yield _tune(workload, stage, lookup, clock)


def lookups(workload: Workload, stage: Pass) -> list[Lookup]:
    """What one pass of ours asks the table for."""
    run = runner(workload, _ours(workload), stage, [workload.make(0)])
    with observed_table() as found:
        run()
    return list(dict.fromkeys(found))


def _ours(workload: Workload) -> Contender:
    return next(one for one in workload.contenders if one.name == OURS)


def _tune(workload: Workload, stage: Pass, lookup: Lookup, clock: Clock) -> Choice:
    entry = lookup.kernel, lookup.key
    present = dict(launches.read_table()[lookup.kernel][lookup.key])
    others = [one for one in lookup.candidates() if one != present]
    run = runner(workload, _ours(workload), stage, [workload.make(0)])

    def trying(options: Options) -> Round:
        def attempt() -> None:
            with observed_table({entry: options}):
                run()

        return Round(attempt, 1)

    brief: list[tuple[float, dict[str, int]]] = []
    passed_over = []
    for options in others:
        try:
            brief.append((min(clock.warm_up(trying(options).run)[1] for _ in range(2)), options))
        except Exception as error:  # does not compile, or asks for more than the chip has
            passed_over.append(f"{short(options)} {explain(error)}")
    brief.sort(key=lambda timed: timed[0])
    finalists = {"present": present, **{f"{place}": one for place, (_, one) in enumerate(brief[:FINALISTS])}}
    times = race(clock, {name: trying(options) for name, options in finalists.items()})
    before = times["present"].median
    for name in sorted(times, key=lambda name: times[name].median):
        if name == "present" or times[name].median * MARGIN > before:
            break
        reason = _objection(workload, stage, entry, finalists[name], present)
        if not reason:
            note = "; ".join(passed_over)
            best = times[name].median
            return Choice(*entry, workload.name, len(others) + 1, before, best, finalists[name], False, note)
        passed_over.append(f"{short(finalists[name])} {reason}")
    return Choice(*entry, workload.name, len(others) + 1, before, before, present, True, "; ".join(passed_over))


def _objection(workload: Workload, stage: Pass, entry: tuple[str, str], options: Options, present: Options) -> str:
    """Why a candidate may not stand in the table, or nothing."""
    with observed_table({entry: options}):
        reason = fault(workload, _ours(workload))
    if reason:
        return reason
    arch = 90 if entry[1].startswith("sm_90") else 80
    found, usual = (_compiled(workload, stage, {entry: one}, arch) for one in (options, present))
    if any(one.spilled for one in found):
        return "spills"
    if any(one.shared > SHARED_MEMORY[arch] for one in found):
        return "needs too much shared memory"
    if [one.products for one in found] != [one.products for one in usual]:
        return "uses other matrix instructions than the present entry"
    return ""


def _compiled(workload: Workload, stage: Pass, trials: Mapping[tuple[str, str], Options], arch: int) -> list[Any]:
    run = runner(workload, _ours(workload), stage, [workload.make(0)])
    with observed_table(trials):
        return [compile_launch(launch, arch) for launch in record(run, arch)]


def short(options: Options) -> str:
    """`BLOCK_Q=128 num_warps=4`"""
    return " ".join(f"{name}={value}" for name, value in options.items())


def write_launches(choices: Sequence[Choice], path: Path = launches.PATH) -> None:
    """Put chosen options into the table, leaving every other entry alone."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for choice in choices:
        table.setdefault(choice.kernel, {})[choice.key] = dict(choice.options)
    _write(table, path)


@dataclass(frozen=True)
class Order:
    """Providers of attention on a chip, a head width and a pass, the fastest first, with their milliseconds."""

    key: str
    milliseconds: dict[str, float]


def order_providers(workloads: Sequence[Workload], clock: Clock, arch: int) -> list[Order]:
    """Time every provider that takes the call, on an attention workload a head width: forward, and both ways."""
    orders = []
    for workload in workloads:
        width = workload.make(0)[0].shape[2]
        providers = {
            one.name.removeprefix("provider ").replace(OURS, "triton"): one
            for one in workload.contenders
            if one.name == OURS or one.name.startswith("provider ")
        }
        for has_gradient in (False, True):
            # An inference forward differs from a training one in what it keeps, and in who takes the call.
            job = workload if has_gradient else replace(workload, work={"forward": workload.work["forward"]})
            stage: Pass = "both" if has_gradient else "forward"
            inputs = [workload.make(0)]
            rounds = {name: Round(runner(job, one, stage, inputs), 1) for name, one in providers.items()}
            times = race(clock, rounds, lambda name, error: None)
            found = sorted(times, key=lambda name: times[name].median)
            key = dispatch.table_key(arch, width, has_gradient)
            orders.append(Order(key, {name: times[name].median for name in found}))
    return orders


def write_providers(orders: Sequence[Order], measured: str, path: Path = dispatch.PATH) -> None:
    """Put orders into the table of providers, with what they were measured on."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for order in orders:
        table[order.key] = {"measured": f"{measured}: {times_of(order)}", "order": list(order.milliseconds)}
    _write(table, path)


def times_of(order: Order) -> str:
    return ", ".join(f"{name} {milliseconds:.4g} ms" for name, milliseconds in order.milliseconds.items())


def _write(table: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def tuning_page(machine: Mapping[str, str], choices: Sequence[Choice], orders: Sequence[Order]) -> str:
    """What was tried and chosen, in Markdown."""
    head = ("kernel", "entry", "at", "tried", "before, ms", "best, ms", "options", "passed over")
    rows = [
        (
            *(one.kernel, one.key, one.shape, str(one.tried), f"{one.before:.4g}", f"{one.best:.4g}"),
            *("kept" if one.kept else short(one.options), one.note),
        )
        for one in choices
    ]
    ranks = [(order.key, times_of(order)) for order in orders]
    parts = [
        f"# Launches tuned on {machine['device']}",
        piped(("", ""), list(machine.items())),
        piped(head, rows),
        "## Providers of attention",
        piped(("chip, head width, pass", "the fastest first"), ranks),
    ]
    return "\n\n".join(parts) + "\n"
