"""What a memory plan says to its reader: a table, whether it fits, and what to change when it does not.

Every piece of advice has been planned again, so it holds as far as the plan does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from engine.memory import MemoryPlan, Setup
from engine.step_seconds import is_known, step_seconds

GIB = 1 << 30
MOST_PROCESSES = 4096

# What common devices let a process allocate, in GiB.
DEVICES = {
    "a 24 GB card (RTX 4090)": 23.5,
    "A100 40 GB": 39.4,
    "a 48 GB card (L40S, A6000)": 44.4,
    "A100 or H100 80 GB": 79.1,
    "H200": 139.8,
}


class AnyPlan(Protocol):
    """A plan that can be made again from another setup."""

    @property
    def setup(self) -> Any: ...
    @property
    def needed_bytes(self) -> int: ...
    def fits(self, device_bytes: int) -> bool: ...
    def replan(self, setup: Any) -> Any: ...


Plan = TypeVar("Plan", bound=AnyPlan)


@dataclass(frozen=True)
class Change(Generic[Plan]):
    """Options to add, what they cost, and the plan with them."""

    options: str
    cost: str
    plan: Plan


def describe(memory: MemoryPlan, device_bytes: int | None = None) -> str:
    """The plan as a table of a few lines, followed by what to change where it does not fit.

    Args:
        device_bytes: memory of the device; None names a device that is large enough instead.
    """
    setup, peak, rest = memory.setup, memory.peak, memory.at_rest
    lines = [
        f"memory of a rank: {setup.world} process{'es' if setup.world > 1 else ''}, {setup.precision}"
        f"{' with 8-bit products' if setup.fp8 else ''}, {setup.tokens_per_pack:,} tokens a pack, "
        f"recompute {setup.recompute}",
        f"{'GiB':<14}{'at rest':>9}{'peak':>9}   peak: {peak.name}",
    ]
    for category in ("weights", "gradients", "optimizer", "activations", "head", "total"):
        lines.append(f"  {category:<12}{getattr(rest, category) / GIB:>9.2f}{getattr(peak, category) / GIB:>9.2f}")
        if category == "weights" and setup.lora is not None:
            shares = {"frozen": memory.frozen, "adapters": rest.weights - memory.frozen}
            lines += [f"    {name:<10}{size / GIB:>9.2f}{size / GIB:>9.2f}" for name, size in shares.items()]
    lines.append(f"A rank needs {gib(memory.needed_bytes)}, with what holds no tensor{_verdict(memory, device_bytes)}.")
    limit = int(max(DEVICES.values()) * GIB) if device_bytes is None else device_bytes
    if not memory.fits(limit):
        changes = advice(memory, limit)
        device = f" one {max(DEVICES, key=lambda name: DEVICES[name])}" if device_bytes is None else ""
        lines += advice_lines(changes, device)
    return "\n".join(lines)


def advice_lines(changes: Sequence[Change[Plan]], device: str) -> list[str]:
    """The changes as they are told. device: words behind "fit"."""
    if not changes:
        return ["No option makes it fit. Use a smaller model."]
    told = [f"  {change.options}  ({change.cost}; {gib(change.plan.needed_bytes)})" for change in changes]
    return [f"Any of these makes it fit{device}:", *told]


def _verdict(memory: MemoryPlan, device_bytes: int | None) -> str:
    if device_bytes is not None:
        return f": it {'fits' if memory.fits(device_bytes) else 'does not fit'} the {gib(device_bytes)} that are there"
    if memory.setup.device == "cpu":
        return ""
    enough = (name for name, size in DEVICES.items() if memory.fits(int(size * GIB)))
    return f": it fits {next(enough, 'no single device')}"


class Ways(NamedTuple):
    """An option, what changing it costs, and from a setup: other setups, each with the option's value.

    The first of them costs the least.
    """

    option: str
    cost: str
    setups: Callable[[Any], Iterator[tuple[Any, Any]]]


def advice(memory: Plan, device_bytes: int, steps: Sequence[Ways] | None = None) -> list[Change[Plan]]:
    """Changes that make a plan fit, each by itself, the cheapest first; where none does, the cheapest together.

    Args:
        memory: a plan that does not fit.
        steps: what can be changed, in order of cost; by default that of a training step.
    Returns:
        nothing when the model is too large for any of them.
    """
    steps = STEPS if steps is None else steps
    singles = [way for ways in steps if (way := _first_that_fits(memory, ways, device_bytes)) is not None]
    return [_change([way]) for way in sorted(singles, key=_seconds)] or _together(memory, device_bytes, steps)


def _together(memory: Plan, device_bytes: int, steps: Sequence[Ways]) -> list[Change[Plan]]:
    """One change after another, the cheapest first, each as far as it helps, until they fit."""
    taken: dict[str, _Way] = {}  # by option: recompute may be changed twice
    for ways in steps:
        way = _first_that_fits(memory, ways, device_bytes)
        way = way or min(_plans(memory, ways), key=lambda way: way.plan.needed_bytes, default=None)
        if way is not None and way.plan.needed_bytes < memory.needed_bytes:
            taken[way.option] = way
            memory = way.plan
            if memory.fits(device_bytes):
                return [_change(list(taken.values()))]
    return []


class _Way(NamedTuple):
    """One option changed: how it is written, what it costs, and the plan with it."""

    option: str
    text: str
    cost: str
    plan: Any


def _plans(memory: AnyPlan, ways: Ways) -> Iterator[_Way]:
    for value, setup in ways.setups(memory.setup):
        yield _Way(ways.option, ways.option.format(value), ways.cost, memory.replan(setup))


def _first_that_fits(memory: AnyPlan, ways: Ways, device_bytes: int) -> _Way | None:
    return next((way for way in _plans(memory, ways) if way.plan.fits(device_bytes)), None)


def _seconds(way: _Way) -> float:
    """Of a step, where that is known: smaller packs may cost less than recomputation, or more. Elsewhere the order of
    STEPS stands."""
    plan = way.plan
    is_told = isinstance(plan, MemoryPlan) and is_known(plan.setup)
    return step_seconds(plan.config, plan.setup).total if is_told else math.inf


def _change(ways: list[_Way]) -> Change[Any]:
    # Each was planned on top of those taken before it, and needs less.
    final = min((way.plan for way in ways), key=lambda planned: planned.needed_bytes)
    return Change(" ".join(way.text for way in ways), "; ".join(way.cost for way in ways), final)


def _half_precision(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    if setup.precision == "fp32" and setup.device == "cuda":
        yield "bf16", replace(setup, precision="bf16")


def _reshard(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    if not setup.reshard_after_forward and setup.is_wrapped:
        yield "true", replace(setup, reshard_after_forward=True)


def _selective(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    if setup.recompute == "none":
        yield "selective", replace(setup, recompute="selective")


def _one_replica(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    if setup.replicas > 1:
        yield 1, replace(setup, replicas=1)


def _smaller_packs(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    while setup.tokens_per_pack % 2 == 0 and setup.tokens_per_pack // 2 >= setup.context:
        setup = replace(setup, tokens_per_pack=setup.tokens_per_pack // 2, micro_batches=setup.micro_batches * 2)
        yield setup.tokens_per_pack, setup


def _full(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    if setup.recompute != "full":
        yield "full", replace(setup, recompute="full")


def _more_processes(setup: Setup) -> Iterator[tuple[Any, Setup]]:
    while setup.world * 2 <= MOST_PROCESSES:
        setup = replace(setup, world=setup.world * 2, micro_batches=math.ceil(setup.micro_batches / 2))
        yield setup.world, setup


# In order of cost.
STEPS = (
    Ways("--train.precision {}", "activations are rounded", _half_precision),
    Ways("--parallel.reshard_after_forward {}", "weights are gathered again for the backward pass", _reshard),
    Ways("--train.recompute {}", "norms and activations are computed twice", _selective),
    Ways("--parallel.replicas {}", "weights are gathered from all processes", _one_replica),
    Ways("--train.micro_batch_tokens {}", "smaller products, more passes a step", _smaller_packs),
    Ways("--train.recompute {}", "every block's forward pass runs twice, a third more work", _full),
    Ways("on {} processes", "more devices", _more_processes),
)


def gib(size: int) -> str:
    """Bytes as a reader wants them."""
    return f"{size / GIB:.1f} GiB"
