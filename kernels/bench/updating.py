"""Workloads without a gradient: the optimizer's update, the gradient's norm, drawing tokens, advantages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from kernels.adamw import adamw, adamw_reference
from kernels.adamw_kernel import Beside
from kernels.bench import peers, targets, work
from kernels.bench.attending import bounds
from kernels.bench.rowwise import Random
from kernels.bench.workload import OURS, Contender, Inputs, Outcome, Workload
from kernels.gae import gae, gae_reference
from kernels.grad_norm import grad_norm, grad_norm_reference
from kernels.masters import join_master, split_master
from kernels.sample import sample

ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
BESIDE: dict[Beside | None, str] = {
    None: "",
    "nearest": ", shadow to nearest",
    "random": ", shadow to random",
    "remainder": ", masters in halves",
}
WITH_SHADOW = "whole masters and a shadow"
GAMMA, LAM = 0.99, 0.95


def parameter_sizes(parameters: int, tensors: int) -> list[int]:
    """Entries of each: one tensor in three is a vector of 4096 at most, the rest are alike."""
    vectors = tensors // 3
    vector = min(4096, parameters // (2 * tensors))
    matrices = tensors - vectors
    left = parameters - vectors * vector
    return [vector] * vectors + [left // matrices] * (matrices - 1) + [left - left // matrices * (matrices - 1)]


def adamw_workload(parameters: int, tensors: int, device: torch.device, *, beside: Beside | None = None) -> Workload:
    """beside: what is written beside the params. Torch has neither shadows nor halves, so ours has no peer then; the
    two ways to have weights in bf16 race each other.
    """
    sizes = parameter_sizes(parameters, tensors)
    rounding = {"rounding_seed": 5} if beside == "random" else {}
    name = "remainders" if beside == "remainder" else "shadows"

    def make(seed: int) -> Inputs:
        random = Random(seed, device, torch.float32)
        params, grads, exp_avgs = (
            [random.normal(size, scale=0.02, has_grad=False) for size in sizes] for _ in range(3)
        )
        exp_avg_sqs = [2 * grad.square() for grad in grads]
        others: list[Tensor] | None = None
        if beside == "remainder":
            params, others = (list(halves) for halves in zip(*map(split_master, params), strict=True))
        elif beside is not None:
            others = empty_shadows(params)
        lr, step, clip_scale, should_skip = (torch.tensor(x, device=device) for x in (0.01, 3.0, 1.0, 0.0))
        return params, grads, exp_avgs, exp_avg_sqs, others, lr, step, clip_scale, should_skip

    def empty_shadows(params: list[Tensor]) -> list[Tensor]:
        return [torch.zeros_like(param, dtype=torch.bfloat16) for param in params]

    def update(of: Callable[..., None], inputs: Inputs, name: str = name) -> None:
        *lists, others, lr, step, clip_scale, should_skip = inputs
        scalars = {"lr": lr, "step": step, "clip_scale": clip_scale, "should_skip": should_skip}
        of(*lists, **scalars, **ADAMW, **{name: others}, **rounding)

    def ours(*inputs: Any) -> None:
        update(adamw, inputs)

    def with_shadow() -> Contender:
        def adapt(inputs: Inputs) -> Inputs:
            params, *lists, remainders, lr, step, clip_scale, should_skip = inputs
            masters = list(map(join_master, params, remainders))
            return masters, *lists, empty_shadows(masters), lr, step, clip_scale, should_skip

        return Contender(WITH_SHADOW, lambda *inputs: update(adamw, inputs, "shadows"), "bound", adapt=adapt)

    def torchs(is_fused: bool) -> Contender:
        def adapt(inputs: Inputs) -> Inputs:
            *lists, _, _, step, _, _ = inputs
            # torch counts steps itself: the fused kernel on the device, the other on the host.
            before = (step - 1).to(device if is_fused else "cpu")
            return *lists, [before.clone() for _ in sizes]

        def call(params, grads, exp_avgs, exp_avg_sqs, steps) -> None:
            torch_adamw(
                params,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                foreach=not is_fused,
                fused=is_fused,
                lr=0.01,
                beta1=ADAMW["betas"][0],
                beta2=ADAMW["betas"][1],
                eps=ADAMW["eps"],
                weight_decay=ADAMW["weight_decay"],
                amsgrad=False,
                maximize=False,
            )

        return Contender("eager" if is_fused else "foreach", torch.no_grad()(call), adapt=adapt)

    def whole(lists: Sequence[list[Tensor] | None]) -> Sequence[list[Tensor] | None]:
        """Masters for their halves."""
        params, *between, remainders = lists
        if beside != "remainder":
            return lists
        assert params is not None and remainders is not None
        return list(map(join_master, params, remainders)), *between, None

    def check(inputs: Inputs, _: list[Tensor], __: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        """How the first tensor, the last vector and the last matrix changed."""
        some = sorted({0, tensors // 3 - 1, tensors - 1} & set(range(tensors)))

        def chosen(lists: Inputs) -> list[list[Tensor] | None]:
            return [None if one is None else [one[i].clone() for i in some] for one in lists[:5]]

        before = make(0)
        expected = chosen(before)
        update(adamw_reference, (*expected, *before[5:]))
        names = ("p", "g", "m", "v", "shadow")
        lists = map(whole, (chosen(inputs), chosen(before), expected))
        for what, found, old, true in zip(names, *lists, strict=True):
            if found is None or old is None or true is None or what == "g":
                continue
            for place, i in enumerate(some):
                # Noise depends on where a tensor lies: of some tensors only the first lies where it did.
                if not (what == "shadow" and beside == "random" and i):
                    yield f"change of {what} {i}", found[place] - old[place], true[place] - old[place]

    others: dict[Beside | None, list[Contender]] = {
        None: [torchs(True), torchs(False)],
        "remainder": [with_shadow()],
    }
    return Workload(
        "adamw",
        f"{parameters / 1e6:g}M in {tensors}{BESIDE[beside]}",
        torch.float32,
        work.adamw_work(parameters, beside in ("nearest", "random")),
        make,
        [Contender(OURS, ours, "ours"), *others.get(beside, [])],
        check,
        targets=[
            targets.percent("forward", 88),
            *([targets.times("forward", WITH_SHADOW, 1.0)] if beside == "remainder" else []),
        ],
    )


def grad_norm_workload(parameters: int, tensors: int, device: torch.device) -> Workload:
    sizes = parameter_sizes(parameters, tensors)

    def make(seed: int) -> Inputs:
        random = Random(seed, device, torch.float32)
        return tuple(random.normal(size, has_grad=False) for size in sizes)

    def eager(*tensors: Tensor) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))

    def check(inputs: Inputs, _: list[Tensor], outcome: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        yield "sum of squares", outcome[0][0], grad_norm_reference(inputs)

    contenders = [
        Contender(OURS, lambda *tensors: grad_norm(tensors), "ours"),
        Contender("eager", eager, canonical=lambda outcome: ([outcome[0][0].square()], [])),
    ]
    return Workload(
        "grad_norm",
        f"{parameters / 1e6:g}M in {tensors}",
        torch.float32,
        work.grad_norm_work(parameters),
        make,
        contenders,
        check,
    )


def sample_workload(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Workload:
    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        logits = random.normal(rows, vocabulary, scale=3.0, has_grad=False)
        return logits, random.integers(1 << 62, rows), torch.tensor(seed, device=device)

    def ours(logits: Tensor, seeds: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        return sample(logits, 1.0, seeds, step)

    def eager(logits: Tensor, seeds: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.softmax(dim=-1, dtype=torch.float32)
        token = p.multinomial(1)
        return token.squeeze(1), p.gather(1, token).squeeze(1).log()

    def gumbel(logits: Tensor, seeds: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        token = (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(dim=-1, keepdim=True)
        return token.squeeze(1), logprobs.gather(1, token).squeeze(1)

    def check(inputs: Inputs, _: list[Tensor], outcome: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        token, logprob = outcome[0]
        yield "logprob", logprob, inputs[0].float().log_softmax(dim=-1).gather(1, token.unsqueeze(1)).squeeze(1)

    contenders = [Contender(OURS, ours, "ours"), Contender("eager", eager)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(gumbel)))
    return Workload(
        "sample",
        f"{rows}x{vocabulary}",
        dtype,
        work.sample_work(rows, vocabulary, dtype.itemsize),
        make,
        contenders,
        check,
        # A smaller one is over before a launch's latency is.
        targets=[targets.percent("forward", 85)] if rows * vocabulary * dtype.itemsize >= 64 << 20 else [],
    )


def gae_workload(trajectories: int, longest: int, device: torch.device) -> Workload:
    """Lengths are spread evenly from a third of the longest; one position in eight is not an action."""
    lengths = torch.linspace(longest / 3, longest, trajectories).long().tolist()
    tokens = sum(lengths)

    def make(seed: int) -> Inputs:
        random = Random(seed, device, torch.float32)
        rewards, values = (random.normal(tokens, has_grad=False) for _ in range(2))
        return rewards, values, bounds(lengths, device), random.integers(8, tokens) > 0

    def ours(rewards: Tensor, values: Tensor, cu_seqlens: Tensor, action_mask: Tensor) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, cu_seqlens, action_mask, GAMMA, LAM)

    def pad(inputs: Inputs) -> Inputs:
        """Time first, as a loop over time wants it; and where each position went."""
        rewards, values, cu_seqlens, action_mask = inputs
        document = torch.arange(trajectories, device=device).repeat_interleave(cu_seqlens.diff())
        place = torch.arange(tokens, device=device) - cu_seqlens[document], document
        padded = []
        for x in (rewards, values, action_mask):
            padded.append(x.new_zeros(longest, trajectories))
            padded[-1][place] = x
        return *padded, *place

    def eager(rewards: Tensor, values: Tensor, action_mask: Tensor, *place: Tensor) -> tuple[Tensor, Tensor]:
        advantages = torch.zeros_like(values)
        next_value, next_advantage = torch.zeros_like(values[0]), torch.zeros_like(values[0])
        for t in reversed(range(longest)):
            delta = rewards[t] + GAMMA * next_value - values[t]
            next_advantage = torch.where(action_mask[t], delta + GAMMA * LAM * next_advantage, next_advantage)
            next_value = torch.where(action_mask[t], values[t], next_value)
            advantages[t] = next_advantage * action_mask[t]
        return advantages[place], ((advantages + values) * action_mask)[place]

    def check(inputs: Inputs, _: list[Tensor], outcome: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        rewards, values, _, action_mask = (x[-lengths[-1] :].cpu() for x in inputs)
        span = torch.tensor([0, lengths[-1]])
        expected = gae_reference(rewards.double(), values.double(), span, action_mask, None, GAMMA, LAM)
        for what, found, true in zip(("advantages", "returns"), outcome[0], expected, strict=True):
            yield what, found[-lengths[-1] :].cpu(), true

    return Workload(
        "gae",
        f"{trajectories} of {longest} at most",
        torch.float32,
        work.gae_work(tokens),
        make,
        [Contender(OURS, ours, "ours"), Contender("eager", eager, adapt=pad)],
        check,
    )
