"""What a plan of several roles says to its reader: a table of phases, room for cached tokens, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from engine.memory import Setup
from engine.memory_advice import DEVICES, GIB, STEPS, Ways, advice, gib
from engine.memory_roles import RolesPlan, RolesSetup
from model.config import PRESETS, ModelConfig
from model.kv_cache import free_memory


def describe_roles(memory: RolesPlan, device_bytes: int | None = None) -> str:
    """The plan as a table of phases, the room for cached tokens, and what to change where it does not fit.

    Args:
        device_bytes: memory of the device; None plans for the smallest common one that suffices, else the largest.
            On a CPU None is what this machine has.
    """
    step = memory.setup.step
    if step.device == "cpu" and device_bytes is None:
        device_bytes = free_memory(torch.device("cpu"))
    named = next((name for name, size in DEVICES.items() if memory.fits(int(size * GIB))), None)
    device = device_bytes or int((DEVICES[named] if named else max(DEVICES.values())) * GIB)
    phases = memory.phases(device)
    rows = [name for name in dict.fromkeys(name for phase in phases for name in phase.parts)]
    rows.sort(key=_order)
    widths = [max(9, len(phase.name) + 2) for phase in phases]
    left = max(map(len, rows)) + 2

    def line(title: str, cells: list[str]) -> str:
        return title.ljust(left) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    def numbers(sizes: Iterator[int]) -> list[str]:
        return [f"{size / GIB:.2f}" if size else "-" for size in sizes]

    lines = [
        f"memory of a rank, phase by phase: {step.world} process{'es' if step.world > 1 else ''}, {step.precision}, "
        f"{step.tokens_per_pack:,} tokens a micro-batch, recompute {step.recompute}",
        line("GiB", [phase.name for phase in phases]),
        *(line(f"  {name}", numbers(phase.parts.get(name, 0) for phase in phases)) for name in rows),
        line("  total", numbers(phase.total for phase in phases)),
    ]
    fits = memory.fits(device)
    if device_bytes is None:
        verdict = f"it fits {named or 'no single device'}"
    else:
        verdict = f"it {'fits' if fits else 'does not fit'} the {gib(device)} that are there"
    lines.append(
        f"A rank needs {gib(memory.needed_bytes)}, with what holds no tensor and the cache's share: {verdict}."
    )
    lines.append(_room(memory, device))
    if memory.host_bytes:
        lines.append(
            f"In host memory wait {gib(memory.host_bytes)} a rank, {gib(step.world * memory.host_bytes)} in all."
        )
    return "\n".join(lines + (_more_room(memory, device) if fits else _what_fits(memory, device)))


def _order(part: str) -> int:
    """Roles first, what is at work last."""
    ends = ["generator", "keys", "gathered", "trajectory", "activations", "head"]
    kinds = ["weights", "moments", "gradients", "frozen"]
    first = part.split()[0].rstrip(",:")
    if first in ends:
        return 100 + ends.index(first)
    return 10 * ["policy", "critic", "reference", "reward"].index(first) + kinds.index(part.split()[-1])


def _room(memory: RolesPlan, device: int) -> str:
    tokens, context = memory.cached_tokens(device), memory.setup.step.context
    rows, each = memory.setup.rows, tokens // memory.setup.rows
    shorter = f", or {rows} of {each:,}" if each < context else ""
    return (
        f"In rollouts there is room for {tokens:,} cached tokens a rank: {tokens // context} answers of {context:,} "
        f"tokens with their prompts{shorter}."
    )


def _more_room(memory: RolesPlan, device: int) -> list[str]:
    """What gives the cache more, where it could use it."""
    tokens = memory.cached_tokens(device)
    if tokens >= memory.setup.rows * memory.setup.step.context:
        return []
    told = []
    for ways in _FOR_CACHE:
        for value, setup in ways.setups(memory.setup):
            more = memory.replan(setup).cached_tokens(device)
            if more > tokens:
                told.append(f"  {ways.option.format(value)}  ({ways.cost}; {more:,} tokens)")
    return ["Any of these makes more room for them:", *told] if told else []


def _what_fits(memory: RolesPlan, device: int) -> list[str]:
    changes = advice(memory, device, _STEPS)
    if not changes:
        return ["No option makes it fit. Use a smaller model."]
    told = [
        f"  {change.options}  ({change.cost}; {gib(change.plan.needed_bytes)}, "
        f"{change.plan.cached_tokens(device):,} cached tokens)"
        for change in changes
    ]
    return ["Any of these makes it fit:", *told]


def _moments_on_host(setup: RolesSetup) -> Iterator[tuple[Any, RolesSetup]]:
    trained = {name: role for name, role in setup.roles.items() if role.is_trained and not role.is_on_host}
    if trained:
        moved = {name: replace(role, is_on_host=True) for name, role in trained.items()}
        yield "true", replace(setup, roles={**setup.roles, **moved})


def _frozen_on_host(name: str) -> Callable[[RolesSetup], Iterator[tuple[Any, RolesSetup]]]:
    def setups(setup: RolesSetup) -> Iterator[tuple[Any, RolesSetup]]:
        role = setup.roles.get(name)
        if role is not None and not role.is_on_host:
            yield "true", replace(setup, roles={**setup.roles, name: replace(role, is_on_host=True)})

    return setups


def _free_generator(setup: RolesSetup) -> Iterator[tuple[Any, RolesSetup]]:
    if setup.keeps_generator:
        yield "false", replace(setup, keeps_generator=False)


def _smaller_critic(setup: RolesSetup) -> Iterator[tuple[Any, RolesSetup]]:
    critic = setup.roles.get("critic")
    for name in reversed(PRESETS):
        if critic is not None and PRESETS[name].num_parameters < critic.config.num_parameters:
            smaller: ModelConfig = replace(PRESETS[name], head="score", context=critic.config.rope_length)
            yield f"DIR, a {name}", replace(setup, roles={**setup.roles, "critic": replace(critic, config=smaller)})


def _no_critic(setup: RolesSetup) -> Iterator[tuple[Any, RolesSetup]]:
    if "critic" in setup.roles:
        yield "group", replace(setup, roles={name: role for name, role in setup.roles.items() if name != "critic"})


def _of_steps(ways: Ways) -> Ways:
    """An option of a training step, as one of all roles."""

    def setups(setup: RolesSetup) -> Iterator[tuple[Any, RolesSetup]]:
        changed: Iterator[tuple[Any, Setup]] = ways.setups(setup.step)
        for value, step in changed:
            yield value, replace(setup, step=step)

    return Ways(ways.option, ways.cost, setups)


# In order of cost.
_FOR_CACHE = (
    Ways("--rollout.offload_moments {}", "moments wait in host memory during rollouts", _moments_on_host),
    Ways("--kl.offload {}", "the reference is copied to the device each iteration", _frozen_on_host("reference")),
    Ways("--reward.offload {}", "the reward model is copied to the device each iteration", _frozen_on_host("reward")),
)
_STEPS = (
    Ways("--rollout.keep {}", "the generator is made anew each iteration", _free_generator),
    *_FOR_CACHE,
    *map(_of_steps, STEPS[:-1]),
    Ways("--value.model {}", "a critic of fewer parameters, trained as a reward model", _smaller_critic),
    Ways("--ppo.advantage {}", "no critic, but two or more answers a prompt", _no_critic),
    *map(_of_steps, STEPS[-1:]),
)
