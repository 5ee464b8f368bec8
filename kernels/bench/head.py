"""Workloads of the language-model head: cross-entropy and log-probabilities without logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.bench import peers, targets, work
from kernels.bench.rowwise import Random, row_check
from kernels.bench.workload import OURS, Contender, Inputs, Workload
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.linear_logprob import linear_logprob, linear_logprob_reference

GIB = 1 << 30


def head_inputs(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> Callable[[int], Inputs]:
    """hidden, weight, targets; logits are standard normal."""

    def make(seed: int) -> Inputs:
        random = Random(seed, device, dtype)
        hidden, weight = random.normal(tokens, width), random.normal(vocabulary, width, scale=width**-0.5)
        return hidden, weight, random.integers(vocabulary, tokens)

    return make


def bare_products(tokens: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Contender:
    """The three matrix products of a head, forward and backward, and nothing else: what targets are multiples of."""

    def adapt(inputs: Inputs) -> Inputs:
        hidden, weight, _ = inputs
        return hidden.detach(), weight.detach(), torch.randn(tokens, vocabulary, dtype=dtype, device=device)

    def multiply(hidden: Tensor, weight: Tensor, dlogits: Tensor) -> tuple[Tensor, ...]:
        return hidden @ weight.t(), dlogits @ weight, dlogits.t() @ hidden

    return Contender("the bare products", multiply, "bound", adapt=adapt, passes=("both",))


def linear_cross_entropy_workload(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> Workload:
    """The sum of the losses. Ours and Liger's make the gradients in the forward pass."""

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels)[0]

    def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy_reference(hidden, weight, labels)[0]

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")

    contenders = [Contender(OURS, call, "ours"), Contender("eager", eager)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(eager)))
    chunked = getattr(F, "linear_cross_entropy", None)  # torch 2.13 and later
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if chunked is not None and options is not None:
        contenders.append(
            Contender("torch chunked", lambda *inputs: chunked(*inputs, reduction="sum", options=options()))
        )
    liger = peers.liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    if liger is not None:

        def fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return liger.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]

        contenders.append(Contender("liger", fused))
    return Workload(
        "linear_cross_entropy",
        f"{tokens}x{width}x{vocabulary}",
        dtype,
        work.head_work(tokens, width, vocabulary, dtype.itemsize),
        head_inputs(tokens, width, vocabulary, dtype, device),
        [*contenders, bare_products(tokens, vocabulary, dtype, device)],
        row_check(reference, (0, 2), is_sum=True),
        upstream="ones",
        targets=[
            targets.times("both", "the bare products", 1.15),
            targets.extra_memory("both", GIB + 4 * vocabulary * width),
        ],
        is_whole=True,
    )


def linear_logprob_workload(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    with_entropy: bool,
    compiled: bool = False,
) -> Workload:
    """Log-probabilities, and entropies, with any gradient a token."""

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor | None]:
        return linear_logprob(hidden, weight, labels, with_entropy=with_entropy)[:2]

    def without(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, labels)[0]

    def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor | None]:
        return linear_logprob_reference(hidden, weight, labels, with_entropy=with_entropy)[:2]

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logprobs = F.log_softmax(hidden @ weight.t(), dim=-1, dtype=torch.float32)
        logprob = logprobs.gather(1, labels.unsqueeze(1)).squeeze(1)
        return (logprob, -(logprobs.exp() * logprobs).sum(dim=-1)) if with_entropy else (logprob,)

    contenders = [Contender(OURS, call, "ours"), Contender("eager", eager)]
    if compiled:
        contenders.append(Contender("compile", peers.compiled(eager)))
    contenders += _liger_logprob(with_entropy)
    contenders.append(bare_products(tokens, vocabulary, dtype, device))
    aims = [targets.times("both", "the bare products", 1.5), targets.extra_memory("both", GIB)]
    if with_entropy:
        contenders.append(Contender("without entropy", without, "bound"))
        aims.append(targets.times("both", "without entropy", 1.05))
    return Workload(
        "linear_logprob",
        f"{tokens}x{width}x{vocabulary}{' with entropy' if with_entropy else ''}",
        dtype,
        work.head_work(tokens, width, vocabulary, dtype.itemsize),
        head_inputs(tokens, width, vocabulary, dtype, device),
        contenders,
        row_check(reference, (0, 2)),
        targets=aims,
    )


def _liger_logprob(with_entropy: bool) -> list[Contender]:
    """Liger's per-token losses: its scaled cross-entropy (0.8), or else its fused one without a reduction."""

    scaled = peers.liger("fused_linear_scaled_cross_entropy", "LigerFusedLinearScaledCrossEntropyFunction")
    fused = peers.liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    contenders = []
    if scaled is not None:

        def call_scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Sequence[Tensor]:
            results = scaled.apply(hidden, weight, labels, 1.0, -100, 1, with_entropy)
            return (-results[0], results[1]) if with_entropy else (-results,)

        contenders.append(Contender("liger", call_scaled))
    if fused is not None and not with_entropy:

        def call_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return -fused.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "none")[0]

        contenders.append(Contender("liger" if scaled is None else "liger fused", call_fused))
    return contenders
