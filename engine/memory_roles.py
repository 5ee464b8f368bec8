"""How much memory a rank needs for reinforcement learning: several models, one of them at work at a time.

    rollout              the policy's weights are gathered into a generator, whose cache takes what is left
    scores, old log-probabilities, reference, values
                         forward passes that keep nothing: one role's blocks gathered in turn
    policy, critic       training steps, one after the other

With N parameters of a role, b bytes a computed number and S ranks that share it, a rank holds, whoever is at work:

    trained   4 N / S masters and 8 N / S moments, which can wait in host memory during rollouts
    frozen    b N / S, or nothing: they can wait in host memory, too
    generator b N of the policy, whole, during rollouts
    gradients 4 N / S of the role that is being trained

A role that trains adapters is frozen but for these: b N / S, and N counts them in the masters, moments and gradients.

What a role at work takes beside that is `engine.memory`'s, so the plan holds as far as those do.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from engine.memory import RESERVED_BYTES, USABLE_SHARE, Moment, Setup, master_bytes, plan, reading, stored_bytes
from engine.memory_heads import FP32
from model.config import ModelConfig, parameter_shapes, projections
from model.generate import PREFILL_TOKENS
from model.kv_cache import PAGE, SHARE, page_bytes, pages_for

_MIB = 1 << 20
# Of a trajectory, a token: its id, whether it was sampled, and seven numbers such as log-probabilities and values.
TRAJECTORY_BYTES = 8 + 1 + 7 * FP32


@dataclass(frozen=True)
class Role:
    """A model that takes part.

    is_trained: with masters, moments and gradients; else frozen.
    is_on_host: its weights, or a trained role's moments during rollouts, wait in host memory while unused.
    """

    config: ModelConfig
    is_trained: bool = False
    is_on_host: bool = False


@dataclass(frozen=True)
class RolesSetup:
    """Who takes part, and in what sizes.

    sampler: whose weights the generator takes: the policy's.
    roles: policy and critic (trained), reference and reward, by name, as far as they are there.
    step: of forward passes, whoever makes them: tokens of a micro-batch, longest prompt with its answer, processes,
        precision, recompute, and what is trained of a role in training; `loss` is set here.
    rows: answers that a rank decodes at once.
    answers: of an iteration, over all ranks.
    cache_bytes: for keys and values; None for the generator's share of what is left.
    keeps_generator: its weights and cache stay while others work.
    reads_pretraining: policy steps learn from other texts, too (PPO-ptx).
    """

    sampler: ModelConfig
    roles: Mapping[str, Role]
    step: Setup
    rows: int = 64
    answers: int = 512
    cache_bytes: int | None = None
    keeps_generator: bool = False
    reads_pretraining: bool = False


@dataclass(frozen=True)
class Phase:
    """Bytes on one rank at a phase's largest moment, by what they are. `total` is their sum."""

    name: str
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class RolesPlan:
    """Every phase of an iteration, for any device.

    The cache depends on the device: what is left of it in the rollout.
    """

    setup: RolesSetup
    at_work: tuple[Phase, ...]  # without a cache
    page: int  # bytes

    def replan(self, setup: RolesSetup) -> RolesPlan:
        return plan_roles(setup)

    @property
    def rollout(self) -> Phase:
        return self.at_work[0]

    def cached_tokens(self, device_bytes: int) -> int:
        """Tokens whose keys and values a rank of such a device can keep during rollouts."""
        return max(0, self._pages(device_bytes) - 1) * PAGE  # one page belongs to nobody

    def phases(self, device_bytes: int) -> tuple[Phase, ...]:
        """In order, with the cache that such a device gets."""
        return self._with_cache(self._pages(device_bytes) * self.page)

    def peak(self, device_bytes: int) -> Phase:
        """The phase that holds the most."""
        return max(self.phases(device_bytes), key=lambda phase: phase.total)

    def fits(self, device_bytes: int) -> bool:
        """Whether a device with so much memory can run this, with the cache that it then gets: one answer at least."""
        usable = USABLE_SHARE * (device_bytes - RESERVED_BYTES[self.setup.step.device])
        return (
            self._pages(device_bytes) > pages_for(self.setup.step.context) and self.peak(device_bytes).total <= usable
        )

    @cached_property
    def needed_bytes(self) -> int:
        """The smallest device that can run this, to a mebibyte."""
        return _MIB * bisect.bisect_left(range(1 << 24), True, key=lambda size: self.fits(size * _MIB))

    @property
    def host_bytes(self) -> int:
        """What a rank keeps in host memory, at most."""
        return sum(_waiting(role, self.setup.step) for role in self.setup.roles.values() if role.is_on_host)

    @property
    def rollout_rest(self) -> int:
        """What the rollout holds when the generator asks what is left: models, but nothing at work."""
        return sum(size for name, size in self.rollout.parts.items() if name not in _AT_WORK)

    def _pages(self, device_bytes: int) -> int:
        """As `model.kv_cache.count_pages` counts them."""
        setup = self.setup
        left = device_bytes - RESERVED_BYTES[setup.step.device] - self.rollout_rest
        budget = int(SHARE[setup.step.device] * left) if setup.cache_bytes is None else setup.cache_bytes
        return max(0, min(budget // self.page, 1 + setup.rows * pages_for(setup.step.context)))

    def _with_cache(self, cache: int) -> tuple[Phase, ...]:
        holders = self.at_work if self.setup.keeps_generator else self.at_work[:1]
        return tuple(
            Phase(phase.name, {**phase.parts, CACHE: cache} if phase in holders else phase.parts)
            for phase in self.at_work
        )


GENERATOR, CACHE, GATHERED, TRAJECTORY, ACTIVATIONS, HEAD = (
    "generator, whole",
    "keys and values",
    "gathered weights",
    "trajectory",
    "activations",
    "head",
)
_AT_WORK = (GATHERED, ACTIVATIONS, HEAD)


def plan_roles(setup: RolesSetup) -> RolesPlan:
    """Plan one iteration on rank 0, the rank that holds the most."""
    roles, step = setup.roles, setup.step
    phases = [_rollout(setup)]
    # Who reads a finished trajectory, in order.
    readers = {"reward": "scores", "policy": "old logprobs", "reference": "reference", "critic": "values"}
    for name, title in readers.items():
        if name in roles:
            # Only words have log-probabilities; a head of one number is known by its config.
            role = roles[name]
            moments = reading(role.config, replace(_own(role, step), loss="logprob"), not role.is_trained)
            phases.append(_phase(setup, title, name, moments))
    for name in ("policy", "critic"):
        if name in roles:
            phases.append(_phase(setup, f"{name} update", name, _step(setup, name)))
    return RolesPlan(setup, tuple(phases), page_bytes(setup.sampler, _dtype(step)))


def _step(setup: RolesSetup, name: str) -> tuple[Moment, ...]:
    config = setup.roles[name].config
    moments = plan(config, replace(setup.step, loss="logprob")).moments
    if name == "policy" and setup.reads_pretraining:
        moments += plan(config, replace(setup.step, loss="cross_entropy")).moments
    return moments


def _phase(setup: RolesSetup, title: str, name: str, moments: tuple[Moment, ...]) -> Phase:
    """A role at work beside those that wait."""
    moment = max(moments, key=lambda moment: moment.total)
    role = setup.roles[name]
    own = _stored(role, setup.step)
    parts = _resting(setup, at_work=name)
    if role.is_trained and moment.gradients:
        parts[f"{name}: gradients"] = moment.gradients
    parts[GATHERED] = moment.weights - own
    parts[TRAJECTORY] = _trajectory(setup)
    parts[ACTIVATIONS] = moment.activations
    parts[HEAD] = moment.head
    if setup.keeps_generator:
        parts[GENERATOR] = _generator(setup)
    return Phase(title, parts)


def _rollout(setup: RolesSetup) -> Phase:
    """The generator with all of its weights, at a prefill or while it takes them over."""
    config, step = setup.sampler, setup.step
    tokens = min(PREFILL_TOKENS, setup.rows * step.context)
    whole = replace(step, tokens_per_pack=tokens, world=1, replicas=1, loss="logprob", lora=None)
    block, _ = reading(config, whole, is_frozen=True)
    largest = step.number_bytes * max(math.prod(shape) for shape in parameter_shapes(config).values())
    parts = _resting(setup, at_work=None)
    parts[GENERATOR] = _generator(setup)
    # One at a time, and as the ranks' parts of it come in; or with the product of its adapters.
    parts[GATHERED] = max(2 * largest, _merging(config, step))
    parts[ACTIVATIONS] = block.activations
    parts[HEAD] = 2 * FP32 * setup.rows * config.vocab_size  # logits of the rows that decode, and a copy to draw from
    return Phase("rollout", parts)


def _resting(setup: RolesSetup, at_work: str | None) -> dict[str, int]:
    """What every role holds; in a rollout nobody of them is at work."""
    parts: dict[str, int] = {}
    for name, role in setup.roles.items():
        if role.is_trained:
            masters = master_bytes(role.config, setup.step)
            if setup.step.lora is not None:
                parts[f"{name}, frozen"] = _stored(role, setup.step) - masters
            parts[f"{name}: fp32 weights"] = masters
            if at_work is not None or not role.is_on_host:
                parts[f"{name}: moments"] = _waiting(role, setup.step)
        elif name == at_work or not role.is_on_host:
            parts[f"{name}, frozen"] = _stored(role, setup.step)
    return parts


def _own(role: Role, step: Setup) -> Setup:
    """The setup of a role: what is frozen has no adapters."""
    return step if role.is_trained else replace(step, lora=None)


def _stored(role: Role, step: Setup) -> int:
    return stored_bytes(role.config, _own(role, step), not role.is_trained)


def _waiting(role: Role, step: Setup) -> int:
    """What can wait in host memory: a trained role's moments, a frozen one's weights."""
    return 2 * master_bytes(role.config, step) if role.is_trained else _stored(role, step)


def _merging(config: ModelConfig, step: Setup) -> int:
    """What the largest `model.lora.merged` of a module holds: its weight, the parts that are done, and the next one's
    sum in fp32, beside its weight where that is narrower; or all parts, and what they are joined to. And a tensor of
    the module behind it, which tells that it is complete."""
    if step.lora is None:
        return 0
    b, most, stacked = step.number_bytes, 0, projections(config)
    shapes = {name: shape for name, shape in parameter_shapes(config).items() if name.endswith(".weight")}
    for (name, shape), behind in zip(shapes.items(), [*list(shapes.values())[1:], (0,)], strict=True):
        parts = stacked.get(name.split(".")[-2], {})
        if any(step.lora.present(parts)):
            rows, last = sum(parts.values()), max(parts.values())
            in_fp32 = FP32 * last * (2 if b < FP32 else 1)
            own = shape[1] * max(b * (2 * rows - last) + in_fp32, 3 * b * rows)
            most = max(most, own + b * math.prod(behind))
    return most


def _generator(setup: RolesSetup) -> int:
    return setup.step.number_bytes * setup.sampler.num_parameters


def _trajectory(setup: RolesSetup) -> int:
    return TRAJECTORY_BYTES * setup.answers * setup.step.context


def _dtype(step: Setup) -> torch.dtype:
    return torch.bfloat16 if step.precision == "bf16" else torch.float32
